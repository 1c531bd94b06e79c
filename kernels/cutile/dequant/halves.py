"""BF16 weights as FP16 ones, which the products take as they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expertd.kernels.numerics.backend import LayerWeights

LARGEST_EXPONENT = 15
"""Of an expert's largest weight, which stays below 2**15; FP16 reaches 65504."""
LEAST = 2.0**-80
"""Lower bound of that weight, so that its expert's scale has a finite reciprocal."""


def to_float16(weights: LayerWeights, device: torch.device) -> LayerWeights:
    """bfloat16 weights with scales of 1, on `device` as float16 with one power of two an expert as all its scales.

    Exact for weights down to 2**-31 of their expert's largest: FP16 has three bits more than BF16 for their digits.
    The error of smaller ones is below 2**-39 of it.
    """
    return LayerWeights(
        *_matrix(weights.up_gate, weights.up_gate_scales, device),
        *_matrix(weights.down, weights.down_scales, device),
        swiglu_limit=weights.swiglu_limit,
    )


def _matrix(weight: Tensor, ones: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """[E, N, K] and scales [E, N/128, K/128]; one expert at a time has its FP32 copy in memory."""
    halves = torch.empty(weight.shape, dtype=torch.float16, device=device)
    scales = ones.to(device, copy=True)
    for expert, (source, out) in enumerate(zip(weight, halves, strict=True)):
        exact = source.to(device).float()
        _, exponent = math.frexp(max(exact.abs().amax().item(), LEAST))
        factor = 2.0 ** (exponent - LARGEST_EXPONENT)
        out.copy_(exact / factor)
        scales[expert] = factor
    return halves, scales
