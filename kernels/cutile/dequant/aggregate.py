"""The weighted sum of each token's expert rows."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch

ConstInt = Annotated[int, ct.ConstantAnnotation()]
COLUMNS = 1024
"""Elements of a row that a block holds at a time."""


@ct.kernel
def aggregate_kernel(
    rows: ct.Array, factors: ct.Array, positions: ct.Array, weights: ct.Array, out: ct.Array, COLUMNS: ConstInt
) -> None:
    token = ct.bid(0)
    column = ct.bid(1)
    total = ct.zeros((1, COLUMNS), dtype=ct.float32)
    for choice in range(positions.shape[1]):
        position = ct.load(positions, (token, choice), (1, 1)).item()
        if position >= 0:
            weight = ct.load(weights, (token, choice), (1, 1)) * ct.load(factors, (position,), (1,)).reshape((1, 1))
            row = ct.load(rows, (position, column), (1, COLUMNS), padding_mode=ct.PaddingMode.ZERO)
            total = total + row.astype(ct.float32) * weight
    ct.store(out, (token, column), total.astype(out.dtype))


def aggregate(rows: Tensor, factors: Tensor, positions: Tensor, weights: Tensor, out: Tensor) -> Launch:
    """Write the sum of `weights[t, j] * rows[p] * factors[p]` over the choices j to `out[t]`, p is `positions[t, j]`.

    Choices with p < 0 are left out. `rows` is [P, H] float32 or bfloat16, `factors` [P] float32, `positions` [T, k]
    int32, `weights` [T, k] float32, `out` [T, H] float32 or bfloat16. This is `index_add` turned round: each token
    collects its rows in the order of its choices, so that its bits depend on nothing else.
    """
    tokens, width = out.shape
    grid = (tokens, ct.cdiv(width, COLUMNS))
    return Launch(aggregate_kernel, grid, (rows, factors, positions, weights, out, COLUMNS))
