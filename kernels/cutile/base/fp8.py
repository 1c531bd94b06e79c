"""FP8 E4M3 values as floats inside kernels, on GPUs with the type and on those without it."""

from __future__ import annotations

import cuda.tile as ct
import torch
from torch import Tensor


def has_fp8(arch: str) -> bool:
    """Whether cuTile knows FP8 on `arch` ("sm_90", ...). Where it does not, kernels are given the bits."""
    return int(arch.removeprefix("sm_")) >= 90


def fp8_operand(values: Tensor, arch: str) -> Tensor:
    """A float8_e4m3fn tensor as kernels on `arch` ("sm_90", ...) take it: as it is, or its bits as uint8."""
    return values if has_fp8(arch) else values.view(torch.uint8)


def fp8_to_float32(values: ct.Tile) -> ct.Tile:
    """A tile of float8_e4m3fn, or of its bits as uint8, to float32. As bits, NaN is not known: it becomes 480.

    E4M3 is binary16 with three of its exponent's bits and seven of its mantissa's cut off; the exponents' biases differ
    by 8. Subnormals come out right, because binary16 scales them by the same power of two.
    """
    if values.dtype == ct.uint8:
        bits = values.astype(ct.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return ct.bitcast(half, ct.float16).astype(ct.float32) * 256.0
    return values.astype(ct.float32)
