"""Random weights and batches for tuning, benches and compile tests; on the meta device they are shapes alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import FP8


def random_weights(
    shape: ExpertShape,
    device: torch.device,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = FP8,
    swiglu_limit: float | None = None,
) -> LayerWeights:
    """Weights of one layer with values spread over FP8's range and scales that differ from block to block; of another
    `dtype` than float8_e4m3fn they are all one power of two."""

    def matrix(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        weight = torch.empty(shape.num_experts, rows, columns, dtype=dtype, device=device)
        for expert in weight:
            expert.copy_(torch.randn(rows, columns, device=device, generator=generator) * 64)
        blocks = (shape.num_experts, rows // BLOCK, columns // BLOCK)
        # Outputs stay near the inputs' size: a row of K products of unit variance has variance K.
        scale = (0.5 + torch.rand(blocks, device=device, generator=generator)) / 64 / columns**0.5
        if dtype != FP8:
            scale.fill_(2.0 ** -round(math.log2(64 * columns**0.5)))
        return weight, scale

    up_gate, up_gate_scales = matrix(2 * shape.intermediate_size, shape.hidden_size)
    down, down_scales = matrix(shape.hidden_size, shape.intermediate_size)
    return LayerWeights(up_gate, up_gate_scales, down, down_scales, swiglu_limit=swiglu_limit)


def random_batch(
    shape: ExpertShape,
    tokens: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    *,
    model_experts: int = 256,
    top_k: int = 8,
) -> TokenBatch:
    """FP8 tokens, each routed to `top_k` of `model_experts` experts with equal chances; the local ones come first."""
    values = torch.randn(tokens, shape.hidden_size, device=device, generator=generator) * 64
    scales = (0.5 + torch.rand(tokens, shape.hidden_size // BLOCK, device=device, generator=generator)) / 64
    chances = torch.rand(tokens, model_experts, device=device, generator=generator)
    chosen = chances.topk(top_k, dim=1).indices
    return TokenBatch(
        hidden=values.to(FP8),
        scales=scales,
        expert_ids=torch.where(chosen < shape.num_experts, chosen, -1).to(torch.int32),
        weights=torch.rand(tokens, top_k, device=device, generator=generator),
    )
