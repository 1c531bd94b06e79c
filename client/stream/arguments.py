"""What stream-ordered calls may be given, as far as the host can see it."""

from __future__ import annotations

import torch
from torch import Tensor

from expertd.client.stream.terms import Terms
from expertd.proto.base.errors import InvalidBatch, UnknownExpert

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def checked(terms: Terms, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor | None) -> Tensor:
    """Where the result of a call goes: `out`, or new memory. Raises `InvalidBatch`, or `UnknownExpert` for a layer."""
    if layer not in terms.layers:
        raise UnknownExpert(f"layer {layer} is on no server; layers served: {list(terms.layers)}")
    for name, tensor in (("hidden", hidden), ("topk_ids", ids), ("topk_weights", weights)):
        if tensor.device != terms.device:
            raise InvalidBatch(f"{name} is on {tensor.device}; stream-ordered calls were prepared on {terms.device}")
    if hidden.dim() < 1 or hidden.shape[-1] != terms.width:
        raise InvalidBatch(f"hidden has the shape {list(hidden.shape)}; it must be [..., {terms.width}]")
    if hidden.dtype not in FLOATS:
        raise InvalidBatch(f"hidden is {hidden.dtype}; it must be bfloat16, float16 or float32")
    tokens = hidden.numel() // terms.width
    if tokens > terms.sizes[-1]:
        raise InvalidBatch(f"hidden has {tokens} tokens; stream-ordered calls were prepared for {terms.sizes[-1]}")
    _check_choices(ids, weights, tokens, terms.top_k)
    if out is None:
        return torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if out.shape != hidden.shape or out.device != terms.device or not out.is_contiguous():
        raise InvalidBatch(f"out must be contiguous, of the shape {list(hidden.shape)}, on {terms.device}")
    return out


def _check_choices(ids: Tensor, weights: Tensor, tokens: int, top_k: int) -> None:
    for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
        if tensor.dim() < 1 or tensor.numel() != tokens * top_k or tensor.shape[-1] != top_k:
            raise InvalidBatch(f"{name} has the shape {list(tensor.shape)}; {tokens} tokens take [..., {top_k}]")
    if ids.dtype not in (torch.int32, torch.int64):
        raise InvalidBatch(f"topk_ids is {ids.dtype}; it must be int32 or int64")
    if not weights.is_floating_point():
        raise InvalidBatch(f"topk_weights is {weights.dtype}; it must be a float dtype")
