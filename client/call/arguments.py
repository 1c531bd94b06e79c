"""Checks of what callers hand to a coordinator; each raises `InvalidBatch` naming the argument and the bound."""

from __future__ import annotations

import operator

import numpy as np
from torch import Tensor

from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.routing import first_repeat
from expertd.proto.base.errors import InvalidBatch


def as_layer(layer: object) -> int:
    """`layer`, an integer of any kind."""
    try:
        return operator.index(layer)  # type: ignore[arg-type]
    except TypeError:
        kind = type(layer).__name__
        raise InvalidBatch(f"layer is {layer!r}, a {kind}; give an int, counted from 0 in the whole model") from None


def as_tokens(name: str, values: Tensor, width: int) -> Tensor:
    """View [..., width] as [T, width] with T >= 1."""
    _check_tensor(name, values)
    if not values.is_floating_point() or values.ndim < 1 or values.shape[-1] != width or values.numel() == 0:
        raise InvalidBatch(
            f"{name} is {values.dtype} {list(values.shape)};"
            f" it must be a float tensor [..., {width}] with at least one row"
        )
    return _view(values, -1, width)


def as_rows(name: str, values: Tensor, rows: int) -> Tensor:
    """View [..., k] as [rows, k]."""
    _check_tensor(name, values)
    if values.ndim < 1 or values.shape[-1] == 0 or values.numel() != rows * values.shape[-1]:
        raise InvalidBatch(f"{name} is {list(values.shape)}; it must have one row for each of {rows} tokens")
    return _view(values, rows, -1)


def check_choice(ids: Tensor, weights: Tensor, model: MoeConfig) -> None:
    """Check routing [T, k] that a caller computed: ids of any integer dtype, float weights."""
    if ids.shape != weights.shape:
        raise InvalidBatch(f"topk_ids is {list(ids.shape)}, topk_weights {list(weights.shape)}; they must agree")
    if ids.shape[1] > model.num_experts_per_tok:
        raise InvalidBatch(
            f"topk_ids has {ids.shape[1]} experts a token; the model's top-k is {model.num_experts_per_tok}"
        )
    values = ids.numpy()
    if ids.is_floating_point() or values.min() < -1 or values.max() >= model.n_routed_experts:
        raise InvalidBatch(f"topk_ids must be integers from 0 to {model.n_routed_experts - 1}, or -1")
    token = first_repeat(values)
    if token is not None:
        raise InvalidBatch(f"topk_ids[{token}] is {ids[token].tolist()}; a token may name an expert at most once")
    if not np.isfinite(weights.float().numpy()).all():
        raise InvalidBatch("topk_weights holds NaN or infinity; they must be finite")


def check_finite(tokens: Tensor) -> None:
    """Check [T, H] hidden states."""
    finite = tokens.isfinite()
    if not finite.all():
        token, column = (~finite).nonzero()[0].tolist()
        value = tokens[token, column].item()
        raise InvalidBatch(f"hidden[{token}, {column}] is {value}; hidden states must be finite")


def _view(values: Tensor, rows: int, columns: int) -> Tensor:
    """As a matrix without gradients; most are one already, and every view costs microseconds."""
    return values if values.ndim == 2 and not values.requires_grad else values.detach().reshape(rows, columns)


def _check_tensor(name: str, values: object) -> None:
    if not isinstance(values, Tensor):
        raise InvalidBatch(
            f"{name} has type {type(values).__name__}; give a torch tensor, such as torch.as_tensor({name})"
        )
