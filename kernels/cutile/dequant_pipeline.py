"""The high-precision pipeline: weights and tokens are dequantised, and nothing is quantised a second time.

BF16 products with FP32 sums; what is rounded is each factor of a product, to BF16. The relative error against exact
arithmetic on the same FP8 inputs stays below 5e-3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.kernels.backend import LayerWeights, Partials, TokenBatch
from expertd.kernels.cutile.aggregate import aggregate
from expertd.kernels.cutile.dequant_hidden import dequant_hidden
from expertd.kernels.cutile.dequant_weights import dequant_weights
from expertd.kernels.cutile.fp8 import fp8_operand
from expertd.kernels.cutile.group_gemm import GroupGemmConfig, candidates, group_gemm
from expertd.kernels.cutile.launch import Gpu, Launch
from expertd.kernels.cutile.silu_and_mul import silu_and_mul
from expertd.kernels.cutile.token_sort import ExpertRows, sort_rows


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
    """Runs batches over the weights of any layer of one shape; keeps room for one layer's BF16 weights."""

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, device: torch.device, gpu: Gpu
    ) -> None:
        def room(rows: int, columns: int) -> Tensor:
            return torch.empty(num_experts, rows, columns, dtype=torch.bfloat16, device=device)

        self._up_gate = room(2 * intermediate_size, hidden_size)
        self._down = room(hidden_size, intermediate_size)
        self._gpu = gpu

    def __call__(
        self, batch: TokenBatch, weights: LayerWeights, config: DequantConfig, active_experts: int | None = None
    ) -> Partials:
        """The partial sums [T, H] float32 of a device batch, without waiting for the device.

        `active_experts` is an upper bound on the different experts in the batch, where the caller knows one that is
        better than the number of experts and slots. `Partials.pairs` counts what was computed.
        """
        bounds = (weights.num_experts, batch.expert_ids.numel(), active_experts)
        active = min(bound for bound in bounds if bound is not None)
        rows = sort_rows(batch.expert_ids, weights.num_experts, active, config.tile_m)
        if active < config.group_from:
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

        def buffer(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(len(rows.tokens), columns, dtype=dtype, device=batch.hidden.device)

        hidden, gather = _hidden_rows(batch, rows.tokens, self._gpu.arch)
        up_gate = buffer(2 * intermediate_size, torch.float32)
        activated = buffer(intermediate_size, torch.bfloat16)
        down = buffer(hidden_size, torch.float32)
        sums = torch.empty(batch.hidden.shape, dtype=torch.float32, device=batch.hidden.device)
        tiles = (rows.tile_slots, rows.num_tiles)
        launches = [
            *gather,
            dequant_weights(
                fp8_operand(weights.up_gate, self._gpu.arch), weights.up_gate_scales, rows.experts, up_gate_weight
            ),
            group_gemm(hidden, up_gate_weight, *tiles, up_gate, config.tile_m, config.up_gate, self._gpu.processors),
            silu_and_mul(up_gate, rows.tokens, activated),
            dequant_weights(fp8_operand(weights.down, self._gpu.arch), weights.down_scales, rows.experts, down_weight),
            group_gemm(activated, down_weight, *tiles, down, config.tile_m, config.down, self._gpu.processors),
            aggregate(down, rows.positions, batch.weights, sums),
        ]
        return launches, sums

    def _individual(self, batch: TokenBatch, rows: ExpertRows, weights: LayerWeights) -> Tensor:
        """All tokens through each active expert in turn: no sorting, and products by the vendor's library."""
        every_token = torch.arange(batch.num_tokens, dtype=torch.int32, device=batch.hidden.device)
        hidden, gather = _hidden_rows(batch, every_token, self._gpu.arch)
        for launch in gather:
            launch()
        activated = hidden.new_empty(batch.num_tokens, weights.down.shape[2])
        sums = torch.zeros(batch.hidden.shape, dtype=torch.float32, device=batch.hidden.device)
        for expert in rows.experts.split(1):
            dequant_weights(
                fp8_operand(weights.up_gate, self._gpu.arch), weights.up_gate_scales, expert, self._up_gate[:1]
            )()
            up_gate = torch.mm(hidden, self._up_gate[0].T, out_dtype=torch.float32)
            silu_and_mul(up_gate, every_token, activated)()
            dequant_weights(fp8_operand(weights.down, self._gpu.arch), weights.down_scales, expert, self._down[:1])()
            down = torch.mm(activated, self._down[0].T, out_dtype=torch.float32)
            chosen = (batch.expert_ids == expert) & (expert >= 0)
            weight = torch.where(chosen, batch.weights, 0.0).sum(dim=1, keepdim=True)
            # Not a plain product: what an absent expert left in `down` may be infinite.
            sums += torch.where(chosen.any(dim=1, keepdim=True), down * weight, 0.0)
        return sums


def _hidden_rows(batch: TokenBatch, tokens: Tensor, arch: str) -> tuple[Tensor, list[Launch]]:
    """The bfloat16 hidden state of each of `tokens` [P], and the launches that have to write it first."""
    if batch.scales is None:
        return batch.hidden.index_select(0, tokens.clamp(min=0)), []
    out = torch.empty(len(tokens), batch.hidden.shape[1], dtype=torch.bfloat16, device=tokens.device)
    return out, [dequant_hidden(fp8_operand(batch.hidden, arch), batch.scales, tokens, out)]
