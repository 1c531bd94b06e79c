"""MXFP4 (OCP's Microscaling Formats, 1.0): E2M1 values, two a byte, with a power of two for each 32 of a row.

A value is `E2M1[code] * 2 ** (exponent - 127)`; the one of the lower column is in the lower half of its byte. Servers
compute with FP8 blocks of 128x128: a block's scale is the power of two with which its largest magnitude becomes 256 or
384. Then a weight is exact unless it has bits below 2^-9 of the scale, 2^-17 of that magnitude or less; such a one is
off by at most 2^-18 of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import expertd._native as native
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.quantize import FP8
from expertd.kernels.numerics.tokens import place

GROUP = 32
"""Consecutive values of a row that share an exponent."""
PACKED = torch.int8
"""What two values are stored as."""
EXPONENTS = torch.float8_e8m0fnu
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TOP, _LEAST_SCALE = 8, -126
_CODES = np.array([*E2M1, *(-value for value in E2M1)], dtype=np.float32)
_PAIRS = np.stack([np.tile(_CODES, 16), _CODES.repeat(16)], axis=1).view(np.float64).squeeze(1)
"""Of each byte its two values, float32, in the bits of one float64."""


def decode(packed: Tensor, exponents: Tensor) -> Tensor:
    """[N, K/2] int8 with [N, K/32] float8_e8m0fnu exponents -> the stored values [N, K] float32, exactly."""
    # NumPy looks up faster than torch, here both values of a byte at once.
    values = torch.from_numpy(_PAIRS.take(packed.view(torch.uint8).numpy()).view(np.float32))
    groups: Tensor = values.unflatten(-1, (-1, GROUP)).mul_(exponents.float().unsqueeze(-1))
    return groups.reshape(values.shape)


def round_to_blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] float32 to ([N, K] float8_e4m3fn, [N/128, K/128] float32 powers of two), those of the module's text."""
    blocks = values.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    largest = blocks.abs().amax(dim=(1, 3))
    exponents = (largest.frexp().exponent - 1 - _TOP).clamp(min=_LEAST_SCALE)
    scales = torch.ones_like(largest).ldexp(exponents.where(largest > 0, 0))
    return (blocks / scales[:, None, :, None]).to(FP8).reshape(values.shape), scales


def convert_into(packed: Tensor, exponents: Tensor, out: Tensor, scales: Tensor) -> tuple[int, bool]:
    """`round_to_blocks(decode(packed, exponents))` to `out` [N, K] and `scales` [N/128, K/128], bit for bit, by the
    native core; no exponent is NaN.

    How many weights are not what was stored, and whether any is not zero.
    """
    rows, columns = out.shape
    return native.convert_mxfp4(
        place(packed, PACKED, (rows, columns // 2)),
        place(exponents, EXPONENTS, (rows, columns // GROUP)),
        rows,
        columns,
        place(out, FP8, (rows, columns)),
        place(scales, torch.float32, (rows // BLOCK, columns // BLOCK)),
    )
