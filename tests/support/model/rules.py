"""The rules that requests must keep, as the engine's are compared with them.

Checks are NumPy's: torch may spread even work as small as this over all cores, which costs more than the work itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertd.kernels.model.ranges import format_ranges
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.numerics.routing import first_repeat
from expertd.proto.base.errors import InvalidBatch, ModelMismatch, StalePlacement, UnknownExpert
from expertd.server.scheduling.shard import Shard
from tests.support.model.messages import ReceivedCall

_NOT_OWNED = -2


@cache
def _local_ids(experts: tuple[int, ...], count: int) -> npt.NDArray[np.int32]:
    """[1 + count]: local id of -1, which is -1, and of each of the model's `count` experts."""
    table = np.full(1 + count, _NOT_OWNED, dtype=np.int32)
    table[0] = -1
    table[1 + np.array(experts)] = np.arange(len(experts))
    return table


def admit(shard: Shard, call: ReceivedCall) -> TokenBatch:
    """Check a decoded call against this shard and return it with local expert ids.

    Raises `ModelMismatch`, `StalePlacement`, `UnknownExpert` or `InvalidBatch`.
    """
    if call.model_fingerprint != shard.model_fingerprint:
        raise ModelMismatch(
            f"model_fingerprint is {quoted(call.model_fingerprint.encode('utf-8', 'surrogateescape'))};"
            f" this server holds {quoted(shard.model_fingerprint.encode())}"
        )
    if call.placement_epoch not in (None, shard.placement_epoch):
        raise StalePlacement(f"placement_epoch is {call.placement_epoch}; the current one is {shard.placement_epoch}")
    if call.layer not in shard.layers:
        raise UnknownExpert(f"layer is {call.layer}; this server owns layers {format_ranges(shard.layers)}")
    _check_finite("weights", call.weights)
    # Those on a GPU came through GPU memory, where the contract does not ask for it.
    if call.scales is not None and not call.scales.is_cuda:
        _check_finite("hidden_scales", call.scales)
    return TokenBatch(
        call.hidden, call.scales, _localise(shard, call.layer, call.expert_ids), call.weights, call.reply_into
    )


def quoted(text: bytes, most: int = 64) -> str:
    """`text` for an error message: at most `most` bytes in quotes, others than printable ASCII as \\xhh."""
    shown = "".join(chr(b) if 0x20 <= b < 0x7F and b not in b"'\\" else f"\\x{b:02x}" for b in text[:most])
    return f"'{shown}'" + (f"... of {len(text)} bytes" if len(text) > most else "")


def _localise(shard: Shard, layer: int, expert_ids: Tensor) -> Tensor:
    owned, count, ids = shard.experts[layer], shard.config.n_routed_experts, expert_ids.numpy()
    try:
        # Unsigned, what is below -1 lies beyond the table, too.
        local = _local_ids(owned, count).take((ids + 1).view(np.uint32))
    except IndexError:
        where, value = _first((ids < -1) | (ids >= count), ids)
        raise InvalidBatch(f"expert_ids{where} is {value}; it must be -1 or from 0 to {count - 1}") from None
    if local.min() == _NOT_OWNED:
        where, value = _first(local == _NOT_OWNED, ids)
        raise UnknownExpert(
            f"expert_ids{where} is {value}; this server owns experts {format_ranges(owned)} of layer {layer}"
        )
    token = first_repeat(ids)
    if token is not None:
        raise InvalidBatch(f"expert_ids[{token}] is {ids[token].tolist()}; a token may name an expert at most once")
    return torch.from_numpy(local)


def _check_finite(field: str, tensor: Tensor) -> None:
    values = tensor.numpy()
    finite = np.isfinite(values)
    if not np.logical_and.reduce(finite, axis=None):
        where, value = _first(~finite, values)
        raise InvalidBatch(f"{field}{where} is {value}; it must be finite")


def _first(mask: npt.NDArray[np.bool_], values: npt.NDArray[Any]) -> tuple[list[int], float]:
    """Index and value of the first element that `mask` marks."""
    where: list[int] = np.argwhere(mask)[0].tolist()
    return where, values[tuple(where)].item()
