"""Token functions on CPU tensors, which the native core computes: what it takes as addresses is checked here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expertd import _native
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.quantize import FP8

_FORMATS = {torch.bfloat16: _native.BFLOAT16, torch.float16: _native.FLOAT16, torch.float32: _native.FLOAT32}


class Addend(NamedTuple):
    """What is added to some rows of a sum."""

    sums: Tensor
    """[n, H] bfloat16, float16 or float32."""
    rows: Tensor
    """[n] int64: the row of the result for each, ascending."""
    weights: Tensor | None = None
    """[n] float32: what each is multiplied with."""


def quantize_into(hidden: Tensor, out: Tensor, scales: Tensor) -> None:
    """Quantise [T, H] of any float dtype to `out` [T, H] float8_e4m3fn, `scales` [T, H/128] float32.

    The bits are those of `quantize_activations`.
    """
    code = _FORMATS.get(hidden.dtype)
    if code is None:
        quantize_into(hidden.float(), out, scales)
        return
    tokens, width = hidden.shape
    _check(out, FP8, tokens, width)
    _check(scales, torch.float32, tokens, width // BLOCK)
    _native.quantize(_place(hidden), code, tokens, width, _place(out), _place(scales))


def gather(values: Tensor, rows: Tensor) -> Tensor:
    """`values[rows]`: of [T, n], the [m] int64 `rows`."""
    count, width = values.shape
    out = torch.empty((len(rows), width), dtype=values.dtype)
    _native.gather(_place(values), count, width * values.itemsize, _vector(rows, torch.int64), len(rows), _place(out))
    return out


def split_by_owner(ids: Tensor, weights: Tensor, owner: Tensor) -> tuple[list[tuple[int, list[Tensor]]], list[int]]:
    """Sort [T, k] int32 ids, -1 for none, and float32 weights by server, as `owner` [n_routed_experts] int64 has it.

    Returns (server, [[n] int64 tokens, [n, k] int32 ids, [n, k] float32 weights]), ascending, and the chosen experts that
    nobody owns; with any of these there is nothing else.
    """
    tokens, top_k = ids.shape
    ids, weights = ids.contiguous(), weights.contiguous()
    _check(weights, torch.float32, tokens, top_k)
    room = tokens * top_k
    out = torch.empty(room, dtype=torch.int64), ids.new_empty(room, top_k), weights.new_empty(room, top_k)
    sizes, orphans = _native.split(
        _vector(ids, torch.int32),
        weights.data_ptr(),
        tokens,
        top_k,
        _vector(owner, torch.int64),
        len(owner),
        (out[0].data_ptr(), out[1].data_ptr(), out[2].data_ptr()),
    )
    # The rest of the room was never touched, so that it costs no memory.
    counts = [count for _, count in sizes]
    pieces = zip(*(each[: sum(counts)].split(counts) for each in out), strict=True)
    return [(server, list(piece)) for (server, _), piece in zip(sizes, pieces, strict=True)], orphans


def count_pairs(ids: Tensor) -> dict[int, int]:
    """How often int32 `ids` of any shape name each expert, ascending; -1 is none."""
    return _native.count_pairs(_vector(ids.contiguous(), torch.int32), ids.numel())


def sum_into(out: Tensor, parts: Sequence[Addend]) -> None:
    """Write to each row of `out` [T, H] of any float dtype its parts, added in FP32 to 0 in the order of `parts`."""
    code = _FORMATS.get(out.dtype)
    if code is None or out.dtype == torch.float16:
        total = torch.empty(out.shape)
        sum_into(total, parts)
        out.copy_(total)
        return
    count, width = out.shape
    _native.sum([_part(part, width) for part in parts], count, width, code, _place(out))


def _part(part: Addend, width: int) -> tuple[tuple[int, int], int, int, int, int]:
    size, weights = len(part.rows), part.weights
    if part.sums.shape != (size, width):
        raise ValueError(f"{list(part.sums.shape)} for {size} rows of {width}")
    weight = 0 if weights is None else _vector(weights, torch.float32, size)
    return _place(part.sums), _FORMATS[part.sums.dtype], size, _vector(part.rows, torch.int64, size), weight


def _place(values: Tensor) -> tuple[int, int]:
    """Address of [n, width] on the CPU, and bytes from one row to the next."""
    row, column = values.stride()
    if not values.is_cpu or (column != 1 and values.shape[1] > 1):
        raise ValueError(f"strides {values.stride()} on {values.device}: rows must be whole and on the CPU")
    return values.data_ptr(), row * values.itemsize


def _vector(values: Tensor, dtype: torch.dtype, size: int | None = None) -> int:
    """Address of contiguous values on the CPU, `size` of them."""
    if values.dtype != dtype or not values.is_cpu or not values.is_contiguous() or size not in (None, values.numel()):
        raise ValueError(f"{values.dtype} {list(values.shape)} on {values.device}: it must be contiguous {dtype}")
    return values.data_ptr()


def _check(values: Tensor, dtype: torch.dtype, rows: int, columns: int) -> None:
    if values.dtype != dtype or values.shape != (rows, columns):
        raise ValueError(f"{values.dtype} {list(values.shape)}: it must be {dtype} [{rows}, {columns}]")
