"""Token functions on CPU tensors, which the native core computes: what it takes as addresses is checked here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import expertd._native as native
from expertd.kernels.memory.results import empty
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.quantize import FP8

FORMATS = {torch.bfloat16: native.BFLOAT16, torch.float16: native.FLOAT16, torch.float32: native.FLOAT32}
ADDEND_FORMATS = FORMATS | {FP8: native.FLOAT8}


class Addend(NamedTuple):
    """What is added to some rows of a sum."""

    sums: Tensor
    """[n, H] bfloat16, float16 or float32, or float8_e4m3fn with `scales`."""
    rows: Tensor
    """[n] int64: the row of the result for each, ascending."""
    weights: Tensor | None = None
    """[n] float32: what each is multiplied with."""
    scales: Tensor | None = None
    """[n, H/128] float32."""


def quantize_into(hidden: Tensor, out: Tensor, scales: Tensor) -> bool:
    """Quantise [T, H] of any float dtype to `out` [T, H] float8_e4m3fn, `scales` [T, H/128] float32.

    The bits are those of `quantize_activations`. Whether all values are finite.
    """
    stored = hidden.dtype
    if stored not in FORMATS:
        return quantize_into(hidden.float(), out, scales)
    tokens, width = shape = hidden.shape
    return native.quantize(
        place(hidden, stored, shape),
        FORMATS[stored],
        tokens,
        width,
        place(out, FP8, shape),
        place(scales, torch.float32, (tokens, width // BLOCK)),
    )


def copy(source: Tensor, out: Tensor) -> None:
    """Copy [n] uint8 to [n] uint8."""
    size = source.numel()
    native.copy(vector(source, torch.uint8, size), size, vector(out, torch.uint8, size))


def gather(values: Tensor, rows: Tensor) -> Tensor:
    """`values[rows]`: of [T, n], the [m] int64 `rows`, at least one."""
    count, width = values.shape
    row_bytes, size = width * values.itemsize, len(rows)
    out = empty((size, row_bytes), torch.uint8)
    native.gather(
        place(values, values.dtype, (count, width)),
        count,
        row_bytes,
        vector(rows, torch.int64, size),
        size,
        (out.data_ptr(), row_bytes),
    )
    return out.view(values.dtype)


def split_by_owner(ids: Tensor, weights: Tensor, owner: Tensor) -> tuple[list[tuple[int, list[Tensor]]], list[int]]:
    """Sort [T, k] int32 ids, -1 for none, and float32 weights by server, as `owner` has it.

    That is [shares, n_routed_experts] int64: for as many shares of the tokens, one after another and as equal as can
    be. Returns (server, [[n] int64 tokens, [n, k] int32 ids, [n, k] float32 weights]), ascending, and the chosen
    experts that nobody owns; with any of these there is nothing else.
    """
    tokens, top_k = ids.shape
    room = tokens * top_k
    ids, weights = ids.contiguous(), weights.contiguous()
    out = torch.empty(room, dtype=torch.int64, device="cpu"), ids.new_empty(room, top_k), weights.new_empty(room, top_k)
    sizes, orphans = native.split(
        vector(ids, torch.int32, room),
        vector(weights, torch.float32, room),
        tokens,
        top_k,
        vector(owner.reshape(-1), torch.int64, owner.numel()),
        owner.shape[1],
        len(owner),
        (out[0].data_ptr(), out[1].data_ptr(), out[2].data_ptr()),
    )
    # The rest of the room was never touched, so that it costs no memory.
    counts = [count for _, count in sizes]
    pieces = zip(*(each[: sum(counts)].split(counts) for each in out), strict=True)
    return [(server, list(piece)) for (server, _), piece in zip(sizes, pieces, strict=True)], orphans


def count_pairs(ids: Tensor) -> dict[int, int]:
    """How often int32 `ids` of any shape name each expert, ascending; -1 is none."""
    count = ids.numel()
    return native.count_pairs(vector(ids.contiguous(), torch.int32, count), count)


def sum_into(out: Tensor, parts: Sequence[Addend]) -> None:
    """Write to each row of `out` [T, H] of any float dtype its parts, added in FP32 to 0 in the order of `parts`."""
    if out.dtype not in (torch.bfloat16, torch.float32):
        total = torch.empty_like(out, dtype=torch.float32)
        sum_into(total, parts)
        out.copy_(total)
        return
    count, width = out.shape
    places = [_part(part, width) for part in parts]
    native.sum_parts(places, count, width, FORMATS[out.dtype], place(out, out.dtype, (count, width)))


def _part(part: Addend, width: int) -> native.SumPart:
    sums, rows, weights, scales = part
    size, stored = len(rows), sums.dtype
    weight = 0 if weights is None else vector(weights, torch.float32, size)
    if (stored == FP8) != (scales is not None):
        raise ValueError(f"sums are {stored}: scales belong to {FP8}, and to nothing else")
    scaled = (0, 0) if scales is None else place(scales, torch.float32, (size, width // BLOCK))
    return (
        place(sums, stored, (size, width)),
        ADDEND_FORMATS[stored],
        size,
        vector(rows, torch.int64, size),
        weight,
        scaled,
    )


def place(values: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> tuple[int, int]:
    """Address of a matrix on the CPU, and bytes from one row to the next."""
    row, column = values.stride()
    if values.dtype != dtype or values.shape != shape or not values.is_cpu or (column != 1 and shape[1] > 1):
        raise ValueError(
            f"{values.dtype} {list(values.shape)}, strides {values.stride()}, on {values.device}:"
            f" it must be {dtype} {list(shape)} with whole rows on the CPU"
        )
    return values.data_ptr(), row * values.itemsize


def vector(values: Tensor, dtype: torch.dtype, size: int) -> int:
    """Address of contiguous values of any shape on the CPU."""
    if values.dtype != dtype or values.numel() != size or not values.is_cpu or not values.is_contiguous():
        raise ValueError(
            f"{values.dtype} {list(values.shape)} on {values.device}: it must be {size} contiguous {dtype} on the CPU"
        )
    return values.data_ptr()
