"""Copies of the tokens' rows in the sorted order, one for each of a token's experts."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
import torch
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, take_turn

ConstInt = Annotated[int, ct.ConstantAnnotation()]


@ct.kernel
def gather_rows_kernel(
    hidden: ct.Array,
    scales: ct.Array,
    pair_rows: ct.Array,
    rows: ct.Array,
    row_scales: ct.Array,
    TOP_K: ConstInt,
    WORDS: ConstInt,
    SCALES: ConstInt,
) -> None:
    take_turn()
    token = ct.bid(0)
    choices = ct.arange(TOP_K, dtype=ct.int32).reshape((1, TOP_K))
    targets = ct.gather(pair_rows, (token, choices), padding_value=-1)
    if ct.max(targets) >= 0:
        values = ct.load(hidden, (token, 0), (1, WORDS), padding_mode=ct.PaddingMode.ZERO, allow_tma=False)
        value_scales = ct.load(
            scales, (token, 0), (1, SCALES), padding_mode=ct.PaddingMode.ZERO, allow_tma=False
        ).reshape((SCALES, 1))
        for choice in ct.static_iter(range(TOP_K)):
            row = ct.extract(targets, (0, choice), (1, 1)).item()
            if row >= 0:
                ct.store(rows, (row, 0), values, allow_tma=False)
                ct.store(row_scales, (0, row), value_scales, allow_tma=False)


def gather_rows(hidden: Tensor, scales: Tensor, pair_rows: Tensor, rows: Tensor, row_scales: Tensor) -> Launch:
    """Copy `hidden[t]` to rows, and `scales[t]` to columns, `pair_rows[t, j]` of `rows` and `row_scales`.

    `hidden` [T, H] and `rows` [R, H] are float8_e4m3fn, `scales` [T, H/128] and `row_scales` [H/128, R] float32,
    `pair_rows` [T, k] int32 with -1 for none.
    """
    tokens, width = hidden.shape
    sizes = tuple(1 << (n - 1).bit_length() for n in (pair_rows.shape[1], width // 4, scales.shape[1]))
    arrays = (hidden.view(torch.int32), scales, pair_rows, rows.view(torch.int32), row_scales)
    return Launch(gather_rows_kernel, (tokens,), (*arrays, *sizes))
