"""Golden batches on the cuTile backend: right weights within the bounds, damaged ones past them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.kernels.cutile.pipeline.arithmetic import Pipeline
from expertd.kernels.cutile.run.backend import CutileBackend
from expertd.kernels.oracle.golden import BOUNDS, Agreement, compare_expert, expert_batch
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import load_layer, read_expert
from tests.support.fence.markers import gpu_only
from tests.support.mutations import DAMAGED, MUTATIONS, Tensors, mutate_checkpoint

pytestmark = gpu_only

LAYER = 1
EXPERTS = tuple(range(12))
MODEL = DemoModel(
    hidden_size=1024,
    moe_intermediate_size=512,
    n_routed_experts=len(EXPERTS),
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    moe_layers=1,
)
PIPELINES: tuple[Pipeline, ...] = ("fast", "dequant")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("original"), MODEL)


def verify(reference: Path, running: Path, pipeline: Pipeline, cache: Path, *experts: int) -> list[Agreement]:
    """Agreement of `experts` of the weights in `running`, on the GPU, with those in `reference`."""
    made = CutileBackend(pipeline, cache=cache)
    with Checkpoint(reference) as right, Checkpoint(running) as served:
        made.load_layer(LAYER, load_layer(served, LAYER, EXPERTS, lambda _: None))
        found = []
        for expert in experts:
            # All experts are local, so that local and global ids are the same.
            batch = expert_batch(right.config, LAYER, expert, 0)
            (out,) = made.submit(LAYER, [batch], torch.float32).result().sums
            found.append(compare_expert(LAYER, expert, out, batch, read_expert(right, LAYER, expert)))
    return found


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_right_weights_are_within_all_bounds(original: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    for agreement in verify(original, original, pipeline, tmp_path / "tune.json", *EXPERTS):
        print(agreement)
        assert agreement.faults(BOUNDS["cutile"]) == ()


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_every_mutation_is_past_a_bound(
    original: Path, mutation: Callable[[Tensors], None], pipeline: Pipeline, tmp_path: Path
) -> None:
    running = shutil.copytree(original, tmp_path / "running")
    mutate_checkpoint(running, LAYER, mutation)
    damaged, right = verify(original, running, pipeline, tmp_path / "tune.json", DAMAGED, 2)
    assert damaged.faults(BOUNDS["cutile"])
    assert right.faults(BOUNDS["cutile"]) == ()
