"""What this server owns, and whether a call may be computed on it.

Checks are NumPy's: torch may spread even work as small as this over all cores, which costs more than the work itself.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertd.kernels.model.config import MoeConfig
from expertd.kernels.model.ranges import format_ranges
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.numerics.routing import first_repeat
from expertd.proto.base.errors import InvalidBatch, ModelMismatch, StalePlacement, UnknownExpert, quoted
from expertd.proto.codec import ExecuteCall
from expertd.server.options.config import InvalidOption

_NOT_OWNED = -2


@dataclass(frozen=True)
class Shard:
    """Some experts of some layers of one model. Raises `InvalidOption` for layers or experts outside the model."""

    config: MoeConfig
    model_fingerprint: str
    placement_epoch: int
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    """Global ids, ascending; the position in this tuple is the local id."""

    def __post_init__(self) -> None:
        for layer in self.layers:
            if layer not in self.config.moe_layers:
                raise InvalidOption(
                    f"--layers names layer {layer}; the model's MoE layers are {format_ranges(self.config.moe_layers)}"
                )
        if self.experts[-1] >= self.config.n_routed_experts:
            raise InvalidOption(
                f"--experts names expert {self.experts[-1]}; the model's experts are"
                f" 0-{self.config.n_routed_experts - 1}"
            )

    @property
    def config_fields(self) -> dict[str, int | float | bool | str | tuple[int, ...]]:
        """The fields of the model's `MoeConfig`."""
        return dataclasses.asdict(self.config)

    @cached_property
    def _local_ids(self) -> npt.NDArray[np.int32]:
        """[1 + n_routed_experts]: local id of -1, which is -1, and of each global id."""
        table = np.full(1 + self.config.n_routed_experts, _NOT_OWNED, dtype=np.int32)
        table[0] = -1
        table[1 + np.array(self.experts)] = np.arange(len(self.experts))
        return table

    def admit(self, call: ExecuteCall) -> TokenBatch:
        """Check a decoded call against this shard and return it with local expert ids.

        Raises `ModelMismatch`, `StalePlacement`, `UnknownExpert` or `InvalidBatch`.
        """
        if call.model_fingerprint != self.model_fingerprint:
            raise ModelMismatch(
                f"model_fingerprint is {quoted(call.model_fingerprint.encode('utf-8', 'surrogateescape'))};"
                f" this server holds {quoted(self.model_fingerprint.encode())}"
            )
        if call.placement_epoch not in (None, self.placement_epoch):
            raise StalePlacement(
                f"placement_epoch is {call.placement_epoch}; the current one is {self.placement_epoch}"
            )
        if call.layer not in self.layers:
            raise UnknownExpert(f"layer is {call.layer}; this server owns layers {format_ranges(self.layers)}")
        _check_finite("weights", call.weights)
        # Those on a GPU came through GPU memory, where the contract does not ask for it.
        if call.scales is not None and not call.scales.is_cuda:
            _check_finite("hidden_scales", call.scales)
        return TokenBatch(call.hidden, call.scales, self._localise(call.expert_ids), call.weights, call.reply_into)

    def _localise(self, expert_ids: Tensor) -> Tensor:
        count, ids = self.config.n_routed_experts, expert_ids.numpy()
        try:
            # Unsigned, what is below -1 lies beyond the table, too.
            local = self._local_ids.take((ids + 1).view(np.uint32))
        except IndexError:
            where, value = _first((ids < -1) | (ids >= count), ids)
            raise InvalidBatch(f"expert_ids{where} is {value}; it must be -1 or from 0 to {count - 1}") from None
        if local.min() == _NOT_OWNED:
            where, value = _first(local == _NOT_OWNED, ids)
            raise UnknownExpert(f"expert_ids{where} is {value}; this server owns experts {format_ranges(self.experts)}")
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
