"""Others' kernels for the same layer, where they are installed: `expertd bench kernels --peers`."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import FP8

Work = Callable[[LayerWeights], Tensor | None]
"""Computes one layer and returns its sums [T, H]; None from a peer that has no whole layer."""
ROW_ALIGNMENT = 128
"""Rows to which DeepGEMM wants each expert's padded."""
BLOCKS = [BLOCK, BLOCK]


@dataclass(frozen=True, slots=True)
class Peer:
    """A package with kernels for experts in FP8 blocks."""

    name: str
    distribution: str
    """As package managers call it."""
    module: str
    scope: str
    """What of a layer is timed."""
    prepare: Callable[[ModuleType, TokenBatch, LayerWeights], Work]
    """From the imported module, a batch of device tensors, and weights of the shape that will be computed."""

    @property
    def version(self) -> str:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def installed(peers: Sequence[Peer], say: Callable[[str], object]) -> list[tuple[Peer, ModuleType]]:
    """The peers that can be imported, with their modules; `say` hears of each other one, and why."""
    found = []
    for peer in peers:
        try:
            found.append((peer, importlib.import_module(peer.module)))
        except ImportError as error:
            say(f"{peer.name} is left out: {error}")
    return found


def _deep_gemm(module: ModuleType, batch: TokenBatch, weights: LayerWeights) -> Work:
    """Both products of rows that are sorted and padded before; those of the second one are any."""
    owners, rows, scales = sorted_rows(batch, weights.num_experts)
    width, inner_width = weights.down.shape[1:]
    inner = torch.ones(len(rows), inner_width, device=rows.device).to(FP8)
    inner_scales = torch.ones(len(rows), inner_width // BLOCK, device=rows.device)
    first, second = (rows.new_empty(len(rows), columns, dtype=torch.bfloat16) for columns in (2 * inner_width, width))

    def work(weights: LayerWeights) -> None:
        product = module.m_grouped_fp8_gemm_nt_contiguous
        product((rows, scales), (weights.up_gate, weights.up_gate_scales), first, owners)
        product((inner, inner_scales), (weights.down, weights.down_scales), second, owners)

    return work


def sorted_rows(batch: TokenBatch, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's expert [R] int32, rows [R, H] float8_e4m3fn and scales [R, H/128] by expert, each padded by zeros."""
    assert batch.scales is not None
    order = batch.expert_ids.flatten().argsort(stable=True)
    chosen = batch.expert_ids.flatten()[order].long()
    order, chosen = order[chosen >= 0], chosen[chosen >= 0]
    counts = chosen.bincount(minlength=experts)
    padded = -(-counts // ROW_ALIGNMENT) * ROW_ALIGNMENT
    rank = torch.arange(len(chosen), device=chosen.device) - (counts.cumsum(0) - counts)[chosen]
    places, tokens = (padded.cumsum(0) - padded)[chosen] + rank, order // batch.expert_ids.shape[1]
    rows = torch.zeros(int(padded.sum()), batch.hidden.shape[1], dtype=torch.uint8, device=chosen.device)
    rows[places] = batch.hidden.view(torch.uint8)[tokens]
    scales = torch.zeros(len(rows), batch.scales.shape[1], device=chosen.device)
    scales[places] = batch.scales[tokens]
    owners = torch.arange(experts, device=chosen.device).repeat_interleave(padded)
    return owners.to(torch.int32), rows.view(FP8), scales


def _sglang(module: ModuleType, batch: TokenBatch, weights: LayerWeights) -> Work:
    hidden = unquantized(batch)

    def work(weights: LayerWeights) -> Tensor:
        scales = {"w1_scale": weights.up_gate_scales, "w2_scale": weights.down_scales}
        layer = (hidden, weights.up_gate, weights.down, batch.weights, batch.expert_ids)
        sums: Tensor = module.fused_experts_impl(*layer, use_fp8_w8a8=True, block_shape=BLOCKS, **scales)
        return sums

    return work


def _vllm(module: ModuleType, batch: TokenBatch, weights: LayerWeights) -> Work:
    """Ids that are no local expert's are those of one more, which is not here."""
    hidden, experts = unquantized(batch), weights.num_experts
    ids = torch.where(batch.expert_ids < 0, experts, batch.expert_ids)
    here = torch.arange(experts + 1, dtype=torch.int32, device=ids.device)
    here[experts] = -1
    config = importlib.import_module("vllm.model_executor.layers.fused_moe.config")

    def work(weights: LayerWeights) -> Tensor:
        quantized = config.fp8_w8a8_moe_quant_config(
            w1_scale=weights.up_gate_scales, w2_scale=weights.down_scales, block_shape=BLOCKS
        )
        layer = (hidden, weights.up_gate, weights.down, batch.weights, ids)
        where = {"global_num_experts": experts + 1, "expert_map": here}
        sums: Tensor = module.fused_experts(*layer, quant_config=quantized, **where)
        return sums

    return work


def unquantized(batch: TokenBatch) -> Tensor:
    """The batch's tokens [T, H] in bfloat16, as layers take them that quantise themselves."""
    assert batch.scales is not None
    return (batch.hidden.float() * batch.scales.repeat_interleave(BLOCK, dim=1)).bfloat16()


LAYER = "whole layer, quantising too"
PEERS = (
    Peer("DeepGEMM", "deep_gemm", "deep_gemm", "both products of sorted rows alone", _deep_gemm),
    Peer("SGLang", "sglang", "sglang.srt.layers.moe.fused_moe_triton.fused_moe", LAYER, _sglang),
    Peer("vLLM", "vllm", "vllm.model_executor.layers.fused_moe", LAYER, _vllm),
)
