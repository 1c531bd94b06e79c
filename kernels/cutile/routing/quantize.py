"""Activations from BF16 to FP8 E4M3 with one FP32 scale for each 1x128 block."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.quantize import FP8_MAX, LEAST_AMAX

ConstInt = Annotated[int, ct.ConstantAnnotation()]
ConstFloat = Annotated[float, ct.ConstantAnnotation()]
ROWS = 16
"""Quantisation blocks that one block of threads takes."""


@ct.kernel(occupancy=8)  # without it the divisions' slow path makes the compiler take every register
def quantize_activations_kernel(
    blocks: ct.Array,
    out: ct.Array,
    scales: ct.Array,
    ROWS: ConstInt,
    BLOCK: ConstInt,
    FP8_MAX: ConstFloat,
    LEAST_AMAX: ConstFloat,
) -> None:
    i = ct.bid(0)
    values = ct.load(blocks, (i, 0), (ROWS, BLOCK), padding_mode=ct.PaddingMode.ZERO).astype(ct.float32)
    amax = ct.max(ct.abs(values), axis=1, keepdims=True)
    # Both divisions are rounded to nearest: a product with the reciprocal would differ from the definition by an ulp.
    scale = ct.maximum(amax, LEAST_AMAX) / FP8_MAX
    ct.store(out, (i, 0), (values / scale).astype(out.dtype))
    ct.store(scales, (i,), scale.reshape((ROWS,)))


def quantize_activations(hidden: Tensor, out: Tensor, scales: Tensor) -> Launch:
    """Quantise [T, H] bfloat16 or float32 to `out` [T, H] float8_e4m3fn and `scales` [T, H/128] float32, contiguous.

    The bits are those of `expertd.kernels.numerics.quantize.quantize_activations` on the CPU.
    """
    blocks = hidden.view(-1, BLOCK)
    args = (blocks, out.view(-1, BLOCK), scales.view(-1), ROWS, BLOCK, FP8_MAX, LEAST_AMAX)
    return Launch(quantize_activations_kernel, (ct.cdiv(len(blocks), ROWS),), args)
