"""The high-precision pipeline: weights and tokens are dequantised, and nothing is quantised a second time.

Weights that are FP16 already, as those of BF16 checkpoints may be, go into the products as they are.

FP16 products with FP32 sums. FP16 rounds eight times finer than BF16; so that its range never matters, every operand is
divided by a factor that is put back in FP32 after the product: a token's and an expert's largest block scale, and the
largest magnitude of an intermediate row. The relative error against exact arithmetic on the same FP8 inputs is about
5e-4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.kernels.cutile.base.fp8 import fp8_operand
from expertd.kernels.cutile.base.launch import Gpu, Launch
from expertd.kernels.cutile.dequant.aggregate import aggregate
from expertd.kernels.cutile.dequant.group_gemm import GroupGemmConfig, candidates, group_gemm
from expertd.kernels.cutile.dequant.hidden import dequant_hidden
from expertd.kernels.cutile.dequant.silu_and_mul import LEAST_FACTOR, silu_and_mul
from expertd.kernels.cutile.dequant.token_sort import ExpertRows, sort_rows
from expertd.kernels.cutile.dequant.weights import dequant_weights
from expertd.kernels.numerics.backend import LayerWeights, Partials, TokenBatch
from expertd.kernels.numerics.quantize import FP8


@dataclass(frozen=True, slots=True)
class DequantConfig:
    """What the tuner chooses for a shape class."""

    tile_m: int
    """Rows of a tile, 64 to 256; every expert's rows are padded to a multiple of it."""
    up_gate: GroupGemmConfig
    down: GroupGemmConfig
    group_from: int = 1
    """Active experts from which one grouped product replaces individual ones."""


def default_config(arch: str, num_tokens: int) -> DequantConfig:
    """The configuration for a shape that nothing was measured for."""
    tile_m = 128 if num_tokens > 2048 and candidates(arch, 128) else 64
    gemm = candidates(arch, tile_m)[0]
    return DequantConfig(tile_m, gemm, gemm)


class DequantPipeline:
    """Runs batches over the weights of any layer of one shape.

    Keeps room for one layer's FP16 weights (2.8 GB for DeepSeek-V3's 32 experts), unless they are FP16; a batch takes
    6H + 10I bytes more for each of its choices from PyTorch's allocator, at most 8.6 GB for 16384 tokens of 8 choices.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        device: torch.device,
        gpu: Gpu,
        *,
        dtype: torch.dtype = FP8,
    ) -> None:
        """`dtype` is the weights': float8_e4m3fn, or float16 with one scale an expert."""

        def room(rows: int, columns: int) -> Tensor:
            return torch.empty(num_experts if dtype == FP8 else 0, rows, columns, dtype=torch.float16, device=device)

        self._up_gate = room(2 * intermediate_size, hidden_size)
        self._down = room(hidden_size, intermediate_size)
        self._gpu = gpu

    def __call__(
        self, batch: TokenBatch, weights: LayerWeights, config: DequantConfig, active_experts: int | None = None
    ) -> Partials:
        """The partial sums [T, H] float32 of a device batch, without waiting for the device.

        `active_experts` is an upper bound on the different experts in the batch, where the caller knows one that is
        better than the number of experts and choices. `Partials.pairs` counts what was computed.
        """
        bounds = (weights.num_experts, batch.expert_ids.numel(), active_experts)
        active = max(1, min(bound for bound in bounds if bound is not None))
        rows = sort_rows(batch.expert_ids, weights.num_experts, active, config.tile_m)
        if active < config.group_from and weights.dtype == FP8:
            sums = self._individual(batch, rows, weights)
        else:
            launches, sums = self.grouped(batch, rows, weights, config)
            for launch in launches:
                launch()
        return Partials(sums=sums, pairs=rows.pairs)

    def grouped(
        self, batch: TokenBatch, rows: ExpertRows, weights: LayerWeights, config: DequantConfig
    ) -> tuple[list[Launch], Tensor]:
        """The launches of all active experts' grouped products, and the sums [T, H] float32 that they write."""
        slots = len(rows.experts)
        hidden_size, intermediate_size = weights.down.shape[1:]
        up_gate_weight, down_weight = self._up_gate[:slots], self._down[:slots]
        tile_experts = rows.experts[rows.tile_slots.clamp(max=slots - 1)]
        tiles = (rows.tile_slots, rows.num_tiles)
        if weights.dtype != FP8:
            up_gate_weight, down_weight = weights.up_gate, weights.down
            tiles = (tile_experts, rows.num_tiles)

        def buffer(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(len(rows.tokens), columns, dtype=dtype, device=batch.hidden.device)

        hidden, factors, gather = _hidden_rows(batch, rows.tokens, self._gpu.arch)
        up_gate_scales, up_gate_factors = _normalized(weights.up_gate_scales)
        down_scales, down_factors = _normalized(weights.down_scales)
        factors *= up_gate_factors[tile_experts.repeat_interleave(config.tile_m)]
        up_gate = buffer(2 * intermediate_size, torch.float32)
        activated = buffer(intermediate_size, torch.float16)
        activated_factors = torch.empty_like(factors)
        down = buffer(hidden_size, torch.float32)
        pair_weights = batch.weights * down_factors[batch.expert_ids]
        sums = torch.empty(batch.hidden.shape, dtype=torch.float32, device=batch.hidden.device)
        arch, processors = self._gpu.arch, self._gpu.processors

        def dequant(weight: Tensor, scales: Tensor, out: Tensor) -> list[Launch]:
            return [dequant_weights(fp8_operand(weight, arch), scales, rows.experts, out)] if weight is not out else []

        launches = [
            *gather,
            *dequant(weights.up_gate, up_gate_scales, up_gate_weight),
            group_gemm(hidden, up_gate_weight, *tiles, up_gate, config.tile_m, config.up_gate, processors),
            silu_and_mul(up_gate, rows.tokens, factors, activated, activated_factors, weights.swiglu_limit),
            *dequant(weights.down, down_scales, down_weight),
            group_gemm(activated, down_weight, *tiles, down, config.tile_m, config.down, processors),
            aggregate(down, activated_factors, rows.positions, pair_weights, sums),
        ]
        return launches, sums

    def _individual(self, batch: TokenBatch, rows: ExpertRows, weights: LayerWeights) -> Tensor:
        """All tokens through each active expert in turn: no sorting, and products by the vendor's library."""
        every_token = torch.arange(batch.num_tokens, dtype=torch.int32, device=batch.hidden.device)
        hidden, factors, gather = _hidden_rows(batch, every_token, self._gpu.arch)
        for launch in gather:
            launch()
        up_gate_scales, up_gate_factors = _normalized(weights.up_gate_scales)
        down_scales, down_factors = _normalized(weights.down_scales)
        up_gate_weight, down_weight = (fp8_operand(w, self._gpu.arch) for w in (weights.up_gate, weights.down))
        activated = hidden.new_empty(batch.num_tokens, weights.down.shape[2])
        activated_factors = torch.empty_like(factors)
        sums = torch.zeros(batch.hidden.shape, dtype=torch.float32, device=batch.hidden.device)
        for expert in rows.experts.split(1):
            dequant_weights(up_gate_weight, up_gate_scales, expert, self._up_gate[:1])()
            up_gate = torch.mm(hidden, self._up_gate[0].T, out_dtype=torch.float32)
            scaled = factors * up_gate_factors[expert]
            silu_and_mul(up_gate, every_token, scaled, activated, activated_factors, weights.swiglu_limit)()
            dequant_weights(down_weight, down_scales, expert, self._down[:1])()
            down = torch.mm(activated, self._down[0].T, out_dtype=torch.float32)
            chosen = (batch.expert_ids == expert) & (expert >= 0)
            weight = torch.where(chosen, batch.weights, 0.0).sum(dim=1) * activated_factors * down_factors[expert]
            # Not a plain product: what an absent expert left in `down` may be infinite.
            sums += torch.where(chosen.any(dim=1, keepdim=True), down * weight.unsqueeze(1), 0.0)
        return sums


def _hidden_rows(batch: TokenBatch, tokens: Tensor, arch: str) -> tuple[Tensor, Tensor, list[Launch]]:
    """Hidden states of `tokens` [P] as float16 rows and their float32 factors, and the launches that write the rows."""
    if batch.scales is None:
        values, factors = _normalized(batch.hidden.float())
        return values.half()[tokens], factors[tokens], []
    scales, factors = _normalized(batch.scales)
    rows = torch.empty(len(tokens), batch.hidden.shape[1], dtype=torch.float16, device=tokens.device)
    return rows, factors[tokens], [dequant_hidden(fp8_operand(batch.hidden, arch), scales, tokens, rows)]


def _normalized(values: Tensor) -> tuple[Tensor, Tensor]:
    """[n, ...] float32 divided by its largest magnitudes along the first axis, and those [n]."""
    largest = values.abs().flatten(1).amax(dim=1).clamp(min=LEAST_FACTOR)
    return values / largest.view(-1, *[1] * (values.ndim - 1)), largest
