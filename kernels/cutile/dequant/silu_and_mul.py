"""SwiGLU over rows that hold the up projection, then the gate."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch
from expertd.kernels.cutile.base.limit import bounded, limit_constant

ConstInt = Annotated[int, ct.ConstantAnnotation()]
ConstFloat = Annotated[float, ct.ConstantAnnotation()]
LEAST_FACTOR = 1e-30
"""Lower bound of a row's factor, so that a row of zeros has a finite reciprocal."""
MOST_COLUMNS = 4096
"""Of a row that registers hold."""
SOME_COLUMNS = 2048
"""Of a longer row, at once."""


def activated(
    ups: ct.Array, gates: ct.Array, row: int, part: int, factor: ct.Tile, COLUMNS: int, LIMIT: float
) -> ct.Tile:
    """SwiGLU [1, COLUMNS] of part of a row, zeros beyond its end."""
    up = ct.load(ups, (row, part), (1, COLUMNS), padding_mode=ct.PaddingMode.ZERO).astype(ct.float32) * factor
    gate = ct.load(gates, (row, part), (1, COLUMNS), padding_mode=ct.PaddingMode.ZERO).astype(ct.float32) * factor
    up, gate = bounded(up, gate, LIMIT)
    sigmoid = ct.truediv(1.0, 1.0 + ct.exp(-gate), rounding_mode=ct.RoundingMode.APPROX)
    return gate * sigmoid * up


@ct.kernel(occupancy=8)
def silu_and_mul_kernel_row_wise(
    up_gate: ct.Array,
    tokens: ct.Array,
    factors: ct.Array,
    out: ct.Array,
    out_factors: ct.Array,
    COLUMNS: ConstInt,
    PARTS: ConstInt,
    LEAST_FACTOR: ConstFloat,
    LIMIT: ConstFloat,
) -> None:
    row = ct.bid(0)
    if ct.load(tokens, (row,), (1,)).item() >= 0:
        width = out.shape[1]
        factor = ct.load(factors, (row,), (1,)).reshape((1, 1))
        ups = up_gate.slice(1, 0, width)
        gates = up_gate.slice(1, width, 2 * width)
        first = activated(ups, gates, row, 0, factor, COLUMNS, LIMIT)
        out_factor = ct.maximum(ct.max(ct.abs(first), axis=1, keepdims=True), LEAST_FACTOR)
        for part in range(1, PARTS):
            later = activated(ups, gates, row, part, factor, COLUMNS, LIMIT)
            out_factor = ct.maximum(ct.max(ct.abs(later), axis=1, keepdims=True), out_factor)
        ct.store(out, (row, 0), (first / out_factor).astype(out.dtype))
        # Computed again: all parts at once are more than registers hold.
        for part in range(1, PARTS):
            later = activated(ups, gates, row, part, factor, COLUMNS, LIMIT)
            ct.store(out, (row, part), (later / out_factor).astype(out.dtype))
        ct.store(out_factors, (row,), out_factor.reshape((1,)))


def silu_and_mul(
    up_gate: Tensor, tokens: Tensor, factors: Tensor, out: Tensor, out_factors: Tensor, limit: float | None = None
) -> Launch:
    """Write `silu(x[p, I:]) * x[p, :I]` as `out[p] * out_factors[p]`, where x[p] is `up_gate[p] * factors[p]`.

    `up_gate` is [P, 2I] float32, `tokens` [P] int32, `factors` and `out_factors` [P] float32, `out` [P, I] float16 or
    float32; one block for each row. A row's factor is its largest magnitude, so that float16 holds any row. Rows whose
    token is negative are left as they are. The reciprocal of the sigmoid is the hardware's approximation. With a
    `limit` x is bounded as `expertd.kernels.numerics.swiglu` says.
    """
    width = out.shape[1]
    columns = 1 << (width - 1).bit_length() if width <= MOST_COLUMNS else SOME_COLUMNS
    sizes = (columns, ct.cdiv(width, columns))
    args = (up_gate, tokens, factors, out, out_factors, *sizes, LEAST_FACTOR, limit_constant(limit))
    return Launch(silu_and_mul_kernel_row_wise, (out.shape[0],), args)
