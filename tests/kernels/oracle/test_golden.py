"""What golden batches can tell apart, in exact arithmetic and in that of the fast pipeline."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.numerics.quantize import dequantize_activations, quantize_activations
from expertd.kernels.oracle.golden import (
    BOUNDS,
    DENSE_TOKENS,
    TOKENS_PER_BLOCK,
    Agreement,
    compare_expert,
    compare_layer,
    expert_batch,
    expert_reference,
    layer_batch,
)
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import ExpertMatrices, read_expert
from tests.support.mutations import DAMAGED, MUTATIONS, OTHER, Tensors, mutate_checkpoint

LAYER, HIDDEN, INNER = 1, 1024, 512
MODEL = DemoModel(
    hidden_size=HIDDEN,
    moe_intermediate_size=INNER,
    n_routed_experts=12,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    moe_layers=1,
)
ARITHMETICS = ("torch", "cutile")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("original"), MODEL)


def served(batch: TokenBatch, matrices: ExpertMatrices, arithmetic: str) -> Tensor:
    """What a server answers: exact, or with intermediate values rounded to FP8 as the fast pipeline does."""
    assert batch.scales is not None
    hidden = dequantize_activations(batch.hidden, batch.scales)
    intermediate = silu(hidden @ matrices.gate.T) * (hidden @ matrices.up.T)
    if arithmetic == "cutile":
        intermediate = dequantize_activations(*quantize_activations(intermediate))
    return intermediate @ matrices.down.T * batch.weights


def verify_expert(reference: Path, running: Path, arithmetic: str, expert: int = DAMAGED, seed: int = 0) -> Agreement:
    with Checkpoint(reference) as right, Checkpoint(running) as wrong:
        batch = expert_batch(right.config, LAYER, expert, seed)
        out = served(batch, read_expert(wrong, LAYER, expert), arithmetic)
        return compare_expert(LAYER, expert, out, batch, read_expert(right, LAYER, expert))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("seed", range(4))
def test_a_right_server_is_within_all_bounds(original: Path, arithmetic: str, seed: int) -> None:
    agreement = verify_expert(original, original, arithmetic, seed=seed)
    assert agreement.faults(BOUNDS[arithmetic]) == ()
    assert agreement.cosine == pytest.approx(1, abs=1e-3)
    assert agreement.tokens == HIDDEN // 128 * TOKENS_PER_BLOCK + DENSE_TOKENS
    if arithmetic == "cutile":
        assert agreement.relative_error > 2e-2, "rounding the intermediate values shows"


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_every_mutation_is_past_a_bound(
    original: Path, tmp_path: Path, mutation: Callable[[Tensors], None], arithmetic: str
) -> None:
    running = shutil.copytree(original, tmp_path / "running")
    mutate_checkpoint(running, LAYER, mutation)
    agreement = verify_expert(original, running, arithmetic)
    print(agreement)
    assert agreement.faults(BOUNDS[arithmetic])
    # Only the damaged experts are blamed.
    assert verify_expert(original, running, arithmetic, expert=2).faults(BOUNDS[arithmetic]) == ()
    others_fault = verify_expert(original, running, arithmetic, expert=OTHER).faults(BOUNDS[arithmetic])
    assert bool(others_fault) == (mutation is MUTATIONS["two experts swapped"])


@pytest.mark.parametrize("projection", ["up_proj", "gate_proj", "down_proj"])
def test_a_block_that_is_a_little_off_is_named(original: Path, tmp_path: Path, projection: str) -> None:
    row, column = (6, 3) if projection == "down_proj" else (3, 6)

    def change(tensors: Tensors) -> None:
        tensors[DAMAGED, f"{projection}.weight_scale_inv"][row, column] *= 1.06

    running = shutil.copytree(original, tmp_path / "running")
    mutate_checkpoint(running, LAYER, change)
    agreement = verify_expert(original, running, "cutile")
    kind = "down" if projection == "down_proj" else "up/gate"
    assert agreement.block == f"{kind} block [{row}, {column}]"
    assert agreement.block_gain == pytest.approx(1.06, abs=0.015)
    bounds = BOUNDS["cutile"]
    assert agreement.relative_error < bounds.relative_error, "the error of the whole output does not show it"
    (fault,) = agreement.faults(bounds)
    assert fault.startswith(f"gain of {kind} block [{row}, {column}] 1.0")


def test_an_expert_without_weights_is_right_when_nothing_comes_back(original: Path) -> None:
    with Checkpoint(original) as checkpoint:
        batch = expert_batch(checkpoint.config, LAYER, 0, 0)
        matrices = read_expert(checkpoint, LAYER, 0)
    empty = dataclasses.replace(matrices, down=torch.zeros(HIDDEN, INNER))
    nothing = torch.zeros(batch.hidden.shape)
    assert compare_expert(LAYER, 0, nothing, batch, empty).faults(BOUNDS["torch"]) == ()
    assert compare_expert(LAYER, 0, nothing + 1, batch, empty).faults(BOUNDS["cutile"])


def test_nan_is_past_every_bound(original: Path) -> None:
    with Checkpoint(original) as checkpoint:
        batch = expert_batch(checkpoint.config, LAYER, 0, 0)
        matrices = read_expert(checkpoint, LAYER, 0)
    out = served(batch, matrices, "torch")
    out[0, 0] = math.nan
    assert len(compare_expert(LAYER, 0, out, batch, matrices).faults(BOUNDS["cutile"])) == 3


def test_batches_are_seeded_and_differ_by_layer_expert_and_seed(original: Path) -> None:
    with Checkpoint(original) as checkpoint:
        config = checkpoint.config
    keys = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 0, 2**63)]
    batches = [expert_batch(config, *key).hidden.view(torch.uint8) for key in keys]
    assert all(
        torch.equal(batch, expert_batch(config, *key).hidden.view(torch.uint8))
        for key, batch in zip(keys, batches, strict=True)
    )
    assert len({batch.numpy().tobytes() for batch in batches}) == len(keys)


def test_the_layers_batch_checks_how_experts_are_added(original: Path) -> None:
    experts = (2, 5, 9, 11, 0)
    with Checkpoint(original) as checkpoint:
        batch = layer_batch(checkpoint.config, LAYER, experts, 0)
        parts = [expert_reference(batch, expert, read_expert(checkpoint, LAYER, expert)) for expert in experts]
    assert set(batch.expert_ids.unique().tolist()) == set(experts)
    assert batch.expert_ids.shape[1] == 4
    total = torch.stack(parts).sum(dim=0)
    assert compare_layer(LAYER, total, total).faults(BOUNDS["torch"]) == ()
    doubled = total.clone()
    doubled[7] += parts[int((batch.expert_ids[7, 0] == torch.tensor(experts)).nonzero())][7]
    assert compare_layer(LAYER, doubled, total).faults(BOUNDS["cutile"])
