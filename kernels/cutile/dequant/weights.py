"""Expert weights from FP8 to the precision of the output, for the experts that have work."""

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
def dequant_weights_kernel(
    weight: ct.IndexedWithInt64[ct.Array],
    scales: ct.Array,
    experts: ct.Array,
    out: ct.IndexedWithInt64[ct.Array],
    COLUMNS: ConstInt,
    BLOCK: ConstInt,
) -> None:
    row = ct.bid(0)
    slot = ct.bid(1)
    expert = ct.load(experts, (slot,), (1,)).item()
    if expert >= 0:
        for column in range(ct.cdiv(weight.shape[2], COLUMNS)):
            values = ct.load(weight, (expert, row, column), (1, 1, COLUMNS), padding_mode=ct.PaddingMode.ZERO)
            scale = ct.load(
                scales, (expert, row // BLOCK, column), (1, 1, COLUMNS // BLOCK), padding_mode=ct.PaddingMode.ZERO
            )
            blocks = fp8_to_float32(values).reshape((COLUMNS // BLOCK, BLOCK))
            exact = blocks * scale.reshape((COLUMNS // BLOCK, 1))
            ct.store(out, (slot, row, column), exact.reshape((1, 1, COLUMNS)).astype(out.dtype))


def dequant_weights(weight: Tensor, scales: Tensor, experts: Tensor, out: Tensor) -> Launch:
    """Write `weight[experts[s]].float() * scale of its 128x128 block` to `out[s]`, one block for each output row.

    `weight` is [E, N, K] float8_e4m3fn or its bits (`fp8_operand`), `scales` [E, N/128, K/128] float32, `experts` [S]
    int32, `out` [S, N, K] float32, float16 or bfloat16. Slots whose expert is negative are left as they are.
    """
    slots, rows, _ = out.shape
    return Launch(dequant_weights_kernel, (rows, slots), (weight, scales, experts, out, COLUMNS, BLOCK))
