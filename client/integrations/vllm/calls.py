"""A layer's call as two operators of torch, between which vLLM computes shared experts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.forward_context import ForwardContext, get_forward_context

from expertd.client.call.pending import PendingCall
from expertd.client.integrations.vllm import failures
from expertd.client.integrations.vllm.fleet import share
from expertd.proto.base.errors import ExpertdError

if TYPE_CHECKING:
    from expertd.client.integrations.vllm.experts import RemoteMethod

_open: dict[int, _Open] = {}
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class _Open:
    """A layer's call between its two operators; pending is None where none was made."""

    method: RemoteMethod
    pending: PendingCall | None
    rows: slice


def tokens_of(context: ForwardContext, rows: int) -> int:
    """Tokens of requests in a batch of `rows`: 0 in vLLM's dummy passes; what follows them is padding."""
    metadata = context.attn_metadata
    if not metadata:
        return 0
    of_layers = metadata.values() if isinstance(metadata, dict) else [of for each in metadata for of in each.values()]
    counts = [count for one in of_layers if (count := getattr(one, "num_actual_tokens", None)) is not None]
    return int(min([rows, *counts]))


def _dispatch(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    """x [T, H], weights and ids [T, k]; returns the number of the call, for `_combine`."""
    context = get_forward_context()
    # Of the engine whose pass it is: another one of the process has layers of the same names.
    method: RemoteMethod = context.no_compile_layers[layer_name].routed_experts.quant_method
    rows = share(tokens_of(context, x.shape[0]), method.rank, method.ranks)
    pending = None
    if rows.stop > rows.start and method.fleet is not None and not failures.failed(context):
        try:
            pending = method.fleet.submit(method.layer, x[rows], topk_ids[rows], topk_weights[rows].float())
        except (ExpertdError, ValueError) as error:
            failures.fail(context, error)
    opened = next(_numbers)
    _open[opened] = _Open(method, pending, rows)
    return torch.tensor(opened, dtype=torch.int64, device="cpu")


def _combine(call: Tensor, x: Tensor) -> Tensor:
    """Sums [T, H] like `x`: zeros for the rows of other ranks, and nothing but NaN once a call of the pass failed."""
    one, context = _open.pop(int(call)), get_forward_context()
    combined = torch.zeros_like(x)
    if one.pending is not None:
        try:
            combined[one.rows].copy_(one.pending.result().output)
        except (ExpertdError, ValueError) as error:
            failures.fail(context, error)
    if failures.failed(context):
        # Other ranks' rows, too: vLLM counts NaN in one row of logits a request, which has several with guessed tokens.
        combined.fill_(torch.nan)
    return combined


def _fake_dispatch(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def _fake_combine(call: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


for _function, _fake in ((_dispatch, _fake_dispatch), (_combine, _fake_combine)):
    _name = f"expertd::{_function.__name__.removeprefix('_')}"
    torch.library.custom_op(_name, _function, mutates_args=()).register_fake(_fake)
dispatch, combine = torch.ops.expertd.dispatch, torch.ops.expertd.combine
