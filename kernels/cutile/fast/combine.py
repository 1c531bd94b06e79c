"""The weighted sum of each token's expert rows, in the order of its choices."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, hinted, take_turn

ConstInt = Annotated[int, ct.ConstantAnnotation()]
COLUMNS = 4096
"""Elements of a row that a block sums at most, in batches that fill the device."""
SMALL_COLUMNS = 512
OCCUPANCY = 8
"""Blocks of `COLUMNS` that a multiprocessor runs at once: with the compiler's own choice, five, 5% slower."""
EAGER_TOKENS = 128
"""Up to this many tokens all choices are read at once; beyond it, choices without a pair are skipped with a branch."""


@ct.kernel
def combine_kernel(
    rows: ct.IndexedWithInt64[ct.Array],
    pair_rows: ct.Array,
    weights: ct.Array,
    out: ct.IndexedWithInt64[ct.Array],
    TOP_K: ConstInt,
    WIDTH: ConstInt,
    COLUMNS: ConstInt,
    EAGER: ConstInt,
) -> None:
    take_turn()
    token = ct.bid(0)
    choices = ct.arange(TOP_K, dtype=ct.int32)
    sources = ct.gather(pair_rows, (token, choices), padding_value=-1)
    choice_weights = ct.gather(weights, (token, choices), mask=sources >= 0, padding_value=0.0)
    column = ct.bid(1) * COLUMNS + ct.arange(COLUMNS, dtype=ct.int32)
    total = ct.zeros((COLUMNS,), dtype=ct.float32)
    for choice in ct.static_iter(range(TOP_K)):
        source = ct.extract(sources, (choice,), (1,)).item()
        weight = ct.extract(choice_weights, (choice,), (1,)).item()
        if EAGER:
            mask = (source >= 0) & (column < WIDTH)
            total = total + ct.gather(rows, (source, column), mask=mask, check_bounds=False).astype(ct.float32) * weight
        elif source >= 0:
            row = ct.gather(rows, (source, column), mask=column < WIDTH, check_bounds=False)
            total = total + row.astype(ct.float32) * weight
    ct.scatter(out, (token, column), total.astype(out.dtype), mask=column < WIDTH, check_bounds=False)


def combine(rows: Tensor, pair_rows: Tensor, weights: Tensor, out: Tensor) -> Launch:
    """Write `sum over j of weights[t, j] * rows[pair_rows[t, j]]` to `out[t]`, pairs with row -1 left out.

    `rows` is [R, H] bfloat16 or float32, `pair_rows` [T, k] int32, `weights` [T, k] float32, `out` [T, H] bfloat16 or
    float32. The sum is in FP32, one choice after the other.
    """
    tokens, width = out.shape
    padded_top_k = 1 << (pair_rows.shape[1] - 1).bit_length()
    columns, eager = (SMALL_COLUMNS, 1) if tokens <= EAGER_TOKENS else (min(COLUMNS, 1 << (width - 1).bit_length()), 0)
    grid = (tokens, ct.cdiv(width, columns))
    kernel = combine_kernel if eager else hinted(combine_kernel, occupancy=OCCUPANCY)
    return Launch(kernel, grid, (rows, pair_rows, weights, out, padded_top_k, width, columns, eager))
