"""SwiGLU over rows that hold the up projection, then the gate."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.launch import Launch

ConstInt = Annotated[int, ct.ConstantAnnotation()]
COLUMNS = 1024
"""Elements of a row that a block holds at a time."""


@ct.kernel
def silu_and_mul_kernel_row_wise(up_gate: ct.Array, tokens: ct.Array, out: ct.Array, COLUMNS: ConstInt) -> None:
    row = ct.bid(0)
    if ct.load(tokens, (row,), (1,)).item() >= 0:
        width = out.shape[1]
        ups = up_gate.slice(1, 0, width)
        gates = up_gate.slice(1, width, 2 * width)
        for column in range(ct.cdiv(width, COLUMNS)):
            up = ct.load(ups, (row, column), (1, COLUMNS), padding_mode=ct.PaddingMode.ZERO).astype(ct.float32)
            gate = ct.load(gates, (row, column), (1, COLUMNS), padding_mode=ct.PaddingMode.ZERO).astype(ct.float32)
            sigmoid = ct.truediv(1.0, 1.0 + ct.exp(-gate), rounding_mode=ct.RoundingMode.APPROX)
            ct.store(out, (row, column), (gate * sigmoid * up).astype(out.dtype))


def silu_and_mul(up_gate: Tensor, tokens: Tensor, out: Tensor) -> Launch:
    """Write `silu(up_gate[p, I:]) * up_gate[p, :I]` to row p of `out`, one block for each row.

    `up_gate` is [P, 2I] float32 or bfloat16, `tokens` [P] int32, `out` [P, I] bfloat16 or float32. Rows whose token
    is negative are left as they are. The reciprocal of the sigmoid is the hardware's approximation.
    """
    return Launch(silu_and_mul_kernel_row_wise, (out.shape[0],), (up_gate, tokens, out, COLUMNS))
