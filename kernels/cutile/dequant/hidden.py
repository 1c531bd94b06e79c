"""Hidden states from FP8 to the precision of the output, sorted by expert on the way."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.fp8 import fp8_to_float32
from expertd.kernels.cutile.base.launch import Launch
from expertd.kernels.model.config import BLOCK

ConstInt = Annotated[int, ct.ConstantAnnotation()]
COLUMNS = 1024
"""Elements of a row that a block holds at a time."""


@ct.kernel
def dequant_hidden_kernel(
    hidden: ct.Array, scales: ct.Array, tokens: ct.Array, out: ct.Array, COLUMNS: ConstInt, BLOCK: ConstInt
) -> None:
    row = ct.bid(0)
    token = ct.load(tokens, (row,), (1,)).item()
    if token >= 0:
        for column in range(ct.cdiv(hidden.shape[1], COLUMNS)):
            values = ct.load(hidden, (token, column), (1, COLUMNS), padding_mode=ct.PaddingMode.ZERO)
            scale = ct.load(scales, (token, column), (1, COLUMNS // BLOCK), padding_mode=ct.PaddingMode.ZERO)
            blocks = fp8_to_float32(values).reshape((COLUMNS // BLOCK, BLOCK))
            exact = blocks * scale.reshape((COLUMNS // BLOCK, 1))
            ct.store(out, (row, column), exact.reshape((1, COLUMNS)).astype(out.dtype))


def dequant_hidden(hidden: Tensor, scales: Tensor, tokens: Tensor, out: Tensor) -> Launch:
    """Write `hidden[tokens[p]].float() * scale of its 1x128 block` to row p of `out`, one block for each row.

    `hidden` is [T, H] float8_e4m3fn or its bits (`fp8_operand`), `scales` [T, H/128] float32, `tokens` [P] int32,
    `out` [P, H] float32, float16 or bfloat16. Rows whose token is negative are left as they are.
    """
    return Launch(dequant_hidden_kernel, (out.shape[0],), (hidden, scales, tokens, out, COLUMNS, BLOCK))
