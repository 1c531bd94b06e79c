"""The dequant pipeline's plan on a CPU: its launches, carried out by torch, compute the reference.

The kernels themselves are compared with torch in tests/gpu; here it is what they are given and what becomes of it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from expertd.kernels.cutile.base.launch import Gpu, Launch
from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.dequant.halves import to_float16
from expertd.kernels.cutile.dequant.layer import DequantConfig, DequantPipeline, default_config
from expertd.kernels.cutile.dequant.token_sort import sort_rows
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import FP8, dequantize_activations, dequantize_weights
from expertd.kernels.oracle.reference import reference_partials, relative_error

CPU = torch.device("cpu")
SHAPE = ExpertShape(6, 256, 128)
CONFIG = default_config("sm_90", 1)


def dequant_hidden(hidden: Tensor, scales: Tensor, tokens: Tensor, out: Tensor, *_: int) -> None:
    exact = dequantize_activations(hidden.view(FP8), scales)
    out[tokens >= 0] = exact[tokens[tokens >= 0]].to(out.dtype)


def dequant_weights(weight: Tensor, scales: Tensor, experts: Tensor, out: Tensor, *_: int) -> None:
    exact = dequantize_weights(weight.view(FP8), scales)
    out[experts >= 0] = exact[experts[experts >= 0]].to(out.dtype)


def group_gemm(a: Tensor, b: Tensor, tile_slots: Tensor, num_tiles: Tensor, out: Tensor, tile_m: int, *_: int) -> None:
    for tile in range(int(num_tiles)):
        rows = slice(tile * tile_m, (tile + 1) * tile_m)
        out[rows] = a[rows].float() @ b[tile_slots[tile]].float().T


def silu_and_mul(
    up_gate: Tensor,
    tokens: Tensor,
    factors: Tensor,
    out: Tensor,
    out_factors: Tensor,
    _columns: int,
    _parts: int,
    least: float,
    limit: float,
) -> None:
    up, gate = (up_gate * factors.unsqueeze(1)).chunk(2, dim=1)
    activated = silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    largest = activated.abs().amax(dim=1).clamp(min=least)
    used = tokens >= 0
    out[used] = (activated / largest.unsqueeze(1))[used].to(out.dtype)
    out_factors[used] = largest[used]


def aggregate(rows: Tensor, factors: Tensor, positions: Tensor, weights: Tensor, out: Tensor, _: int) -> None:
    out.zero_()
    for slot in range(positions.shape[1]):
        used = positions[:, slot] >= 0
        row = positions[used, slot]
        out[used] += rows[row] * (factors[row] * weights[used, slot]).unsqueeze(1)


BY_TORCH: dict[str, Callable[..., None]] = {
    "dequant_hidden": dequant_hidden,
    "dequant_weights": dequant_weights,
    "group_gemm": group_gemm,
    "silu_and_mul": silu_and_mul,
    "aggregate": aggregate,
}


def carry_out(launch: Launch) -> None:
    args: tuple[Any, ...] = launch.args
    BY_TORCH[launch.name](*args)


def sums(
    batch: TokenBatch, weights: LayerWeights, config: DequantConfig = CONFIG, active: int = 6, arch: str = "sm_90"
) -> Tensor:
    experts, hidden_size, intermediate_size = weights.down.shape
    pipeline = DequantPipeline(experts, hidden_size, intermediate_size, CPU, Gpu(arch, 132), dtype=weights.dtype)
    rows = sort_rows(batch.expert_ids, experts, active, config.tile_m)
    launches, out = pipeline.grouped(batch, rows, weights, config)
    for launch in launches:
        carry_out(launch)
    return out


@pytest.fixture
def weights() -> LayerWeights:
    return random_weights(SHAPE, CPU, torch.Generator().manual_seed(1))


def batch_of(tokens: int) -> TokenBatch:
    batch = random_batch(SHAPE, tokens, CPU, torch.Generator().manual_seed(tokens), model_experts=12, top_k=4)
    batch.weights[batch.expert_ids < 0] = torch.nan
    return batch


@pytest.mark.parametrize("config", [CONFIG, default_config("sm_90", 16384)], ids=["few rows", "many rows"])
@pytest.mark.parametrize("tokens", [2, 3, 64, 257])
def test_computes_the_reference(weights: LayerWeights, tokens: int, config: DequantConfig) -> None:
    batch = batch_of(tokens)
    assert relative_error(sums(batch, weights, config), reference_partials(batch, weights)) < 1e-3


@pytest.mark.parametrize("limit", [0.1, 1.0])
def test_a_bound_is_computed_as_the_reference_has_it(weights: LayerWeights, limit: float) -> None:
    batch, bounded = batch_of(33), replace(weights, swiglu_limit=limit)
    assert relative_error(sums(batch, bounded), reference_partials(batch, bounded)) < 1e-3
    assert relative_error(sums(batch, bounded), reference_partials(batch, weights)) > 1e-2


@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
def test_takes_fp8_as_bits_where_the_gpu_has_no_fp8(weights: LayerWeights, arch: str) -> None:
    batch = batch_of(5)
    assert torch.equal(sums(batch, weights, arch=arch), sums(batch, weights))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_magnitudes_outside_the_range_of_fp16(weights: LayerWeights, scale: float) -> None:
    batch = batch_of(33)
    assert batch.scales is not None
    batch.scales.mul_(scale)
    weights.up_gate_scales.div_(scale)
    weights.down_scales.mul_(scale)
    assert relative_error(sums(batch, weights), reference_partials(batch, weights)) < 1e-3


def test_takes_bf16_hidden_states(weights: LayerWeights) -> None:
    batch = batch_of(17)
    assert batch.scales is not None
    batch = replace(batch, hidden=dequantize_activations(batch.hidden, batch.scales).bfloat16(), scales=None)
    assert relative_error(sums(batch, weights), reference_partials(batch, weights)) < 1e-3


def plain_weights(size: float) -> LayerWeights:
    """BF16, as loaded; experts differ in magnitude, and one has a weight far larger than all its others."""
    generator = torch.Generator().manual_seed(2)

    def matrix(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        weight = torch.randn(6, rows, columns, generator=generator) * size
        weight *= torch.logspace(-3, 3, 6).view(-1, 1, 1)
        weight[2, 0, 0] = size * 1e4
        return weight.bfloat16(), torch.ones(6, rows // 128, columns // 128)

    return LayerWeights(*matrix(256, 256), *matrix(256, 128))


@pytest.mark.parametrize("tokens", [1, 33, 257])
@pytest.mark.parametrize("size", [0.05, 1e-9, 1e6])
def test_takes_bf16_weights_without_dequantising_them(size: float, tokens: int) -> None:
    loaded, batch = plain_weights(size), batch_of(tokens)
    kept = to_float16(loaded, CPU)
    for ours, scales, theirs in (
        (kept.up_gate, kept.up_gate_scales, loaded.up_gate),
        (kept.down, kept.down_scales, loaded.down),
    ):
        difference = (dequantize_weights(ours, scales) - theirs.float()).abs().amax(dim=(1, 2))
        assert (difference <= theirs.float().abs().amax(dim=(1, 2)) * 2.0**-39).all()
        assert not difference[[0, 1, 3, 4, 5]].any()
    rows = sort_rows(batch.expert_ids, 6, 6, CONFIG.tile_m)
    launches, _ = DequantPipeline(6, 256, 128, CPU, Gpu("sm_90", 132), dtype=torch.float16).grouped(
        batch, rows, kept, CONFIG
    )
    assert "dequant_weights" not in [launch.name for launch in launches]
    assert relative_error(sums(batch, kept), reference_partials(batch, loaded)) < 1e-3


def test_fp16_weights_keep_the_bound() -> None:
    loaded = replace(plain_weights(0.05), swiglu_limit=2.0)
    assert to_float16(loaded, CPU).swiglu_limit == 2.0


def test_no_expert_and_one_expert(weights: LayerWeights) -> None:
    batch = batch_of(9)
    nowhere = replace(batch, expert_ids=torch.full_like(batch.expert_ids, -1))
    assert not sums(nowhere, weights, active=1).any()
    ids = nowhere.expert_ids.clone()
    ids[:, 2] = 5
    one = replace(batch, expert_ids=ids, weights=torch.ones_like(batch.weights))
    assert relative_error(sums(one, weights, active=1), reference_partials(one, weights)) < 1e-3
