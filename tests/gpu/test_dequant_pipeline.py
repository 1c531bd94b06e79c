"""The dequant pipeline against exact arithmetic on the same FP8 inputs: a relative error of 1e-3 at most."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expertd.kernels.cutile.base.launch import Gpu
from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.dequant.group_gemm import candidates
from expertd.kernels.cutile.dequant.layer import DequantConfig, DequantPipeline
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.numerics.quantize import dequantize_activations
from expertd.kernels.numerics.routing import route
from expertd.kernels.oracle.reference import reference_partials, relative_error
from tests.gpu.synchronisation import no_synchronisation
from tests.support.fence.markers import gpu_only
from tests.support.kernels.flashinfer_oracle import moe_fp8_block_scale_ds_routing

pytestmark = gpu_only

BOUND = 1e-3
CUDA = torch.device("cuda")
SHAPES = [ExpertShape(32, 1024, 512), ExpertShape(8, 2176, 640), ExpertShape(64, 256, 128)]
LONG = ExpertShape(4, 256, 14336)
GROUPED = DequantConfig(64, candidates("sm_90", 64)[0], candidates("sm_90", 64)[1])
WIDE = DequantConfig(128, candidates("sm_90", 128)[0], candidates("sm_90", 128)[1])
INDIVIDUAL = replace(GROUPED, group_from=1000)
PATHS = pytest.mark.parametrize("config", [GROUPED, WIDE, INDIVIDUAL], ids=["grouped", "wide", "individual"])


def pipeline(shape: ExpertShape) -> DequantPipeline:
    return DequantPipeline(shape.num_experts, shape.hidden_size, shape.intermediate_size, CUDA, Gpu.of(CUDA))


def with_ids(batch: TokenBatch, ids: Tensor) -> TokenBatch:
    return replace(batch, expert_ids=ids.to(torch.int32))


@PATHS
@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 64, 129, 257])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_within_bound(shape: ExpertShape, tokens: int, config: DequantConfig) -> None:
    weights = random_weights(shape, CUDA)
    batch = random_batch(shape, tokens, CUDA, model_experts=2 * shape.num_experts)
    batch.weights[batch.expert_ids < 0] = torch.nan
    partials = pipeline(shape)(batch, weights, config)
    assert relative_error(partials.sums, reference_partials(batch, weights)) < BOUND
    ids = batch.expert_ids[batch.expert_ids >= 0]
    assert torch.equal(partials.pairs, ids.bincount(minlength=shape.num_experts).to(torch.int32))


@PATHS
def test_long_rows(config: DequantConfig) -> None:
    weights, batch = random_weights(LONG, CUDA), random_batch(LONG, 65, CUDA, model_experts=8)
    sums = pipeline(LONG)(batch, weights, config).sums
    assert relative_error(sums, reference_partials(batch, weights)) < BOUND


@PATHS
def test_no_expert_and_one_expert(config: DequantConfig) -> None:
    shape = SHAPES[0]
    weights, run = random_weights(shape, CUDA), pipeline(shape)
    batch = random_batch(shape, 33, CUDA)
    nowhere = with_ids(batch, torch.full_like(batch.expert_ids, -1))
    assert not run(nowhere, weights, config).sums.any()
    assert not run(nowhere, weights, config, active_experts=0).sums.any()
    one = torch.full_like(batch.expert_ids, -1)
    one[:, 3] = 31
    everyone = with_ids(batch, one)
    sums = run(everyone, weights, config, active_experts=1).sums
    assert relative_error(sums, reference_partials(everyone, weights)) < BOUND


def test_fp8_as_bits_gives_the_same_as_fp8() -> None:
    shape = SHAPES[0]
    weights, batch = random_weights(shape, CUDA), random_batch(shape, 65, CUDA)
    without_fp8 = replace(Gpu.of(CUDA), arch="sm_80")
    run = DequantPipeline(shape.num_experts, shape.hidden_size, shape.intermediate_size, CUDA, without_fp8)
    assert torch.equal(run(batch, weights, GROUPED).sums, pipeline(shape)(batch, weights, GROUPED).sums)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@PATHS
def test_magnitudes_outside_the_range_of_fp16(config: DequantConfig, scale: float) -> None:
    shape = SHAPES[0]
    weights, batch = random_weights(shape, CUDA), random_batch(shape, 65, CUDA)
    assert batch.scales is not None
    batch.scales.mul_(scale)
    weights.up_gate_scales.mul_(1 / scale)
    weights.down_scales.mul_(scale)
    batch.hidden[3].zero_()
    assert relative_error(pipeline(shape)(batch, weights, config).sums, reference_partials(batch, weights)) < BOUND


def test_bf16_hidden_states() -> None:
    shape = SHAPES[0]
    weights = random_weights(shape, CUDA)
    batch = random_batch(shape, 65, CUDA)
    assert batch.scales is not None
    batch = replace(batch, hidden=dequantize_activations(batch.hidden, batch.scales).bfloat16(), scales=None)
    assert relative_error(pipeline(shape)(batch, weights, GROUPED).sums, reference_partials(batch, weights)) < BOUND


def test_bits_depend_neither_on_the_run_nor_on_the_rest_of_the_batch() -> None:
    shape = SHAPES[0]
    weights, run = random_weights(shape, CUDA), pipeline(shape)
    batch = random_batch(shape, 257, CUDA, model_experts=64)
    sums = run(batch, weights, GROUPED).sums
    for _ in range(5):
        assert torch.equal(run(batch, weights, GROUPED).sums, sums)
    assert batch.scales is not None
    part = torch.randperm(257, device=CUDA)[:91]
    smaller = TokenBatch(batch.hidden[part], batch.scales[part], batch.expert_ids[part], batch.weights[part])
    assert torch.equal(run(smaller, weights, GROUPED).sums, sums[part])


def test_grouped_does_not_wait_for_the_device() -> None:
    shape = SHAPES[0]
    weights, run = random_weights(shape, CUDA), pipeline(shape)
    batch = random_batch(shape, 64, CUDA)
    run(batch, weights, GROUPED)
    with no_synchronisation():
        run(batch, weights, GROUPED)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_flashinfer_definition_at_full_size(tokens: int) -> None:
    shape, first_expert = ExpertShape(), 32
    weights = random_weights(shape, CUDA)
    batch = random_batch(shape, tokens, CUDA)
    assert batch.scales is not None
    logits, bias = torch.randn(tokens, 256, device=CUDA), torch.randn(256, device=CUDA).bfloat16() / 10
    expected = moe_fp8_block_scale_ds_routing(
        logits,
        bias,
        batch.hidden,
        batch.scales.T,
        weights.up_gate,
        weights.up_gate_scales,
        weights.down,
        weights.down_scales,
        first_expert,
        2.5,
    )
    ids, gates = route(logits, bias.float(), MoeConfig())
    local = torch.where((ids >= first_expert) & (ids < first_expert + 32), ids - first_expert, -1)
    routed = replace(with_ids(batch, local), weights=gates)
    assert relative_error(pipeline(shape)(routed, weights, GROUPED).sums, expected) < BOUND
