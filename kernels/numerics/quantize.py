"""FP8 E4M3 block quantisation: one FP32 scale per 1x128 block of a token, or per 128x128 block of a weight matrix.

A value is `stored.float() * scale`, with scale = max(|block|, 1e-10) / 448 (DeepSeek-V3 report, section 3.3.2, and the
`weight_scale_inv` tensors of its checkpoints).
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertd.kernels.model.config import BLOCK

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
LEAST_AMAX = 1e-10
"""Lower bound of a block's largest magnitude, so that a block of zeros has a finite, non-zero scale."""


def quantize_activations(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise [T, H] bfloat16 or float32 to ([T, H] float8_e4m3fn, [T, H/128] float32 scales)."""
    tokens, width = hidden.shape
    blocks = hidden.float().reshape(tokens, width // BLOCK, BLOCK)
    # By a tensor: on a GPU torch would multiply with a number's reciprocal, which differs by an ulp.
    scales = blocks.abs().amax(dim=-1).clamp_(min=LEAST_AMAX) / blocks.new_full((), FP8_MAX)
    return (blocks / scales.unsqueeze(-1)).to(FP8).reshape(tokens, width), scales


def dequantize_activations(hidden: Tensor, scales: Tensor) -> Tensor:
    """[T, H] float8_e4m3fn with [T, H/128] float32 scales -> [T, H] float32."""
    tokens, width = hidden.shape
    blocks = hidden.float().reshape(tokens, width // BLOCK, BLOCK)
    return blocks.mul_(scales.unsqueeze(-1)).reshape(tokens, width)


def quantize_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise [..., N, K] to ([..., N, K] float8_e4m3fn, [..., N/128, K/128] float32 scales)."""
    blocks = _weight_blocks(weight.float())
    scales = blocks.abs().amax(dim=(-3, -1)).clamp_(min=LEAST_AMAX) / FP8_MAX
    return (blocks / scales[..., :, None, :, None]).to(FP8).reshape(weight.shape), scales


def dequantize_weights(weight: Tensor, scales: Tensor) -> Tensor:
    """[..., N, K] float8_e4m3fn with [..., N/128, K/128] float32 scales -> [..., N, K] float32."""
    return _weight_blocks(weight.float()).mul_(scales[..., :, None, :, None]).reshape(weight.shape)


def _weight_blocks(weight: Tensor) -> Tensor:
    """View [..., N, K] as [..., N/128, 128, K/128, 128]."""
    *lead, rows, columns = weight.shape
    return weight.reshape(*lead, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
