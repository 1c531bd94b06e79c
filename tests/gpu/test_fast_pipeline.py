"""The fast pipeline against exact arithmetic on the same FP8 inputs: a relative error of 3e-2 at most."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.fast.layer import Workspace, layer_steps
from expertd.kernels.cutile.fast.tiles import BOTH, DEEP, FEW, FEW_8, PAIRED, SINGLE, WIDE, LayerConfig
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.oracle.reference import reference_partials, relative_error
from tests.support.fence.markers import gpu_only

pytestmark = gpu_only

BOUND = 3e-2
CUDA = torch.device("cuda")
PROCESSORS = 132
SHAPES = [ExpertShape(32, 2048, 512), ExpertShape(8, 2176, 640), ExpertShape(64, 256, 128)]
LONG = ExpertShape(4, 256, 14336)
CONFIGS = {
    "one token": SINGLE,
    "8 rows": FEW_8,
    "16 rows": LayerConfig(16, FEW, FEW),
    "few rows then wide": LayerConfig(64, replace(FEW, occupancy=1, latency=2), DEEP),
    "64 rows": LayerConfig(64, DEEP, DEEP),
    "64 rows, paired": LayerConfig(64, PAIRED, PAIRED),
    "64 rows, up and gate": LayerConfig(64, BOTH, PAIRED, overlaps=True),
    "128 rows": LayerConfig(128, WIDE, WIDE),
}
PATHS = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def compute(batch: TokenBatch, weights: LayerWeights, config: LayerConfig, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Sums and pairs, from memory that held NaN and nonsense before."""
    workspace = Workspace.allocate(batch.num_tokens, batch.expert_ids.shape[1], weights, config.tile_rows, CUDA)
    for tensor in (workspace.rows, workspace.inner):
        tensor.view(torch.uint8).fill_(0x7F)
    for tensor in (workspace.row_scales, workspace.inner_scales, workspace.up_gate, workspace.outputs):
        tensor.fill_(torch.nan)
    schedule = workspace.schedule
    for tensor in (schedule.pair_rows, schedule.pairs, schedule.tile_experts, schedule.num_tiles, schedule.counts):
        tensor.fill_(-77)
    sums = torch.full(batch.hidden.shape, torch.nan, device=CUDA)
    for step in layer_steps(batch, weights, sums, workspace, config, PROCESSORS, steps):
        for launch in step:
            launch()
    return sums, schedule.pairs


def take(batch: TokenBatch, tokens: Tensor) -> TokenBatch:
    assert batch.scales is not None
    return TokenBatch(batch.hidden[tokens], batch.scales[tokens], batch.expert_ids[tokens], batch.weights[tokens])


@PATHS
@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 64, 129, 257])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_within_bound(shape: ExpertShape, tokens: int, config: LayerConfig) -> None:
    weights = random_weights(shape, CUDA)
    batch = random_batch(shape, tokens, CUDA, model_experts=2 * shape.num_experts)
    batch.weights[batch.expert_ids < 0] = torch.nan
    sums, pairs = compute(batch, weights, config)
    assert relative_error(sums, reference_partials(batch, weights)) < BOUND
    ids = batch.expert_ids[batch.expert_ids >= 0]
    assert torch.equal(pairs, ids.bincount(minlength=shape.num_experts).to(torch.int32))


@pytest.mark.parametrize("config", [FEW_8, LayerConfig(64, PAIRED, PAIRED)], ids=["8 rows", "64 rows"])
def test_long_rows(config: LayerConfig) -> None:
    weights, batch = random_weights(LONG, CUDA), random_batch(LONG, 65, CUDA, model_experts=8)
    assert relative_error(compute(batch, weights, config)[0], reference_partials(batch, weights)) < BOUND


@PATHS
@pytest.mark.parametrize("limit", [0.1, 1.0])
def test_a_bound_is_computed_as_the_reference_has_it(limit: float, config: LayerConfig) -> None:
    shape = SHAPES[0]
    weights = random_weights(shape, CUDA, swiglu_limit=limit)
    batch = random_batch(shape, 129, CUDA, model_experts=64)
    sums, _ = compute(batch, weights, config)
    assert relative_error(sums, reference_partials(batch, weights)) < BOUND
    assert relative_error(sums, reference_partials(batch, replace(weights, swiglu_limit=None))) > BOUND


@PATHS
def test_no_expert_and_one_expert(config: LayerConfig) -> None:
    shape = SHAPES[0]
    weights = random_weights(shape, CUDA)
    batch = random_batch(shape, 333, CUDA)
    nowhere = replace(batch, expert_ids=torch.full_like(batch.expert_ids, -1))
    sums, pairs = compute(nowhere, weights, config)
    assert not sums.any()
    assert not pairs.any()
    ids = torch.full_like(batch.expert_ids, -1)
    ids[:, 3] = 31
    everyone = replace(batch, expert_ids=ids)
    assert relative_error(compute(everyone, weights, config)[0], reference_partials(everyone, weights)) < BOUND


@PATHS
def test_bits_depend_neither_on_the_run_nor_on_the_order(config: LayerConfig) -> None:
    shape = SHAPES[0]
    weights = random_weights(shape, CUDA)
    batch = random_batch(shape, 257, CUDA, model_experts=64)
    sums, _ = compute(batch, weights, config)
    for _ in range(5):
        assert torch.equal(compute(batch, weights, config)[0], sums)
    part = torch.randperm(257, device=CUDA)[:91]
    assert torch.equal(compute(take(batch, part), weights, config)[0], sums[part])


@PATHS
@pytest.mark.parametrize("steps", [2, 4])
def test_steps_leave_the_same_bits(steps: int, config: LayerConfig) -> None:
    weights = random_weights(SHAPES[0], CUDA)
    for tokens in (17, 257):
        batch = random_batch(SHAPES[0], tokens, CUDA, model_experts=64)
        assert torch.equal(compute(batch, weights, config, steps)[0], compute(batch, weights, config)[0])


def test_wide_tiles_of_all_sizes_round_alike() -> None:
    shape = SHAPES[0]
    weights = random_weights(shape, CUDA)
    batch = random_batch(shape, 257, CUDA, model_experts=64)
    sums = compute(batch, weights, CONFIGS["128 rows"])[0]
    for name in ("64 rows", "64 rows, paired", "64 rows, up and gate"):
        assert torch.equal(compute(batch, weights, CONFIGS[name])[0], sums)
        single = compute(take(batch, torch.tensor([5], device=CUDA)), weights, CONFIGS[name])[0]
        assert torch.equal(single[0], sums[5])


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_one_token_goes_to_any_of_its_experts(shape: ExpertShape, slots: int) -> None:
    """To none, to some, to one twice; ids that are nobody's here count as none."""
    weights = random_weights(shape, CUDA)
    batch = random_batch(shape, 1, CUDA, top_k=slots)
    for ids in ([-1] * 8, [3, -1, 1, 7, 0, 99, 2, 6], [5] * 8, [*range(8)]):
        chosen = torch.tensor([ids[:slots]], dtype=torch.int32, device=CUDA)
        here = torch.where(chosen < shape.num_experts, chosen, -1)
        sums, pairs = compute(replace(batch, expert_ids=chosen), weights, CONFIGS["one token"])
        assert relative_error(sums, reference_partials(replace(batch, expert_ids=here), weights)) < BOUND
        counts = here[here >= 0].bincount(minlength=shape.num_experts)
        assert torch.equal(pairs, counts.to(torch.int32))


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_any_number_of_slots(slots: int) -> None:
    shape = SHAPES[0]
    weights = random_weights(shape, CUDA)
    batch = random_batch(shape, 37, CUDA, model_experts=40, top_k=slots)
    sums, _ = compute(batch, weights, CONFIGS["16 rows"])
    assert relative_error(sums, reference_partials(batch, weights)) < BOUND
