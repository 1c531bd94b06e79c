"""The weighted sum of each token's expert rows, in the order of its slots."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.launch import Launch

ConstInt = Annotated[int, ct.ConstantAnnotation()]
COLUMNS = 1024
"""Elements of a row that a block sums."""


@ct.kernel
def combine_kernel(
    rows: ct.IndexedWithInt64[ct.Array],
    pair_rows: ct.Array,
    weights: ct.Array,
    out: ct.IndexedWithInt64[ct.Array],
    SLOTS: ConstInt,
    WIDTH: ConstInt,
    COLUMNS: ConstInt,
) -> None:
    token = ct.bid(0)
    slot = ct.arange(SLOTS, dtype=ct.int32).reshape((SLOTS, 1))
    source = ct.gather(pair_rows, (token, slot), padding_value=-1)
    weight = ct.gather(weights, (token, slot), mask=source >= 0, padding_value=0.0)
    column = ct.bid(1) * COLUMNS + ct.arange(COLUMNS, dtype=ct.int32).reshape((1, COLUMNS))
    # All rows are asked for at once: a loop over the slots would wait for memory once a slot.
    values = ct.gather(rows, (source, column), mask=(source >= 0) & (column < WIDTH), check_bounds=False)
    total = ct.sum(values.astype(ct.float32) * weight, axis=0, keepdims=True)
    ct.store(out, (token, ct.bid(1)), total.astype(out.dtype))


def combine(rows: Tensor, pair_rows: Tensor, weights: Tensor, out: Tensor) -> Launch:
    """Write `sum over j of weights[t, j] * rows[pair_rows[t, j]]` to `out[t]`, pairs with row -1 left out.

    `rows` is [R, H] bfloat16 or float32, `pair_rows` [T, k] int32, `weights` [T, k] float32, `out` [T, H] bfloat16 or
    float32. The sum is in FP32 in an order that depends on k alone.
    """
    tokens, width = out.shape
    slots = 1 << (pair_rows.shape[1] - 1).bit_length()
    grid = (tokens, ct.cdiv(width, COLUMNS))
    return Launch(combine_kernel, grid, (rows, pair_rows, weights, out, slots, width, COLUMNS))
