"""The cuTile backend from host tensors to host tensors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertd.kernels.backend import LayerWeights, Partials, TokenBatch, UnsupportedShape
from expertd.kernels.cutile.backend import CutileBackend, Pipeline
from expertd.kernels.cutile.inputs import ExpertShape, random_batch, random_weights
from expertd.kernels.quantize import dequantize_activations, quantize_activations
from expertd.kernels.reference import reference_partials, relative_error
from tests.markers import gpu_only

pytestmark = gpu_only

SHAPE = ExpertShape(8, 1024, 256)
CPU = torch.device("cpu")
BOUNDS: dict[Pipeline, float] = {"fast": 3e-2, "dequant": 5e-3}


def backend(
    tmp_path: Path, pipeline: Pipeline = "fast", *, batch_invariant: bool = False
) -> tuple[CutileBackend, LayerWeights]:
    made = CutileBackend(pipeline, batch_invariant=batch_invariant, max_tokens=512, cache=tmp_path / "tune.json")
    weights = random_weights(SHAPE, CPU)
    made.load_layer(3, weights)
    return made, weights


def host_batch(tokens: int) -> TokenBatch:
    return random_batch(SHAPE, tokens, CPU, model_experts=16)


def compute(made: CutileBackend, *batches: TokenBatch) -> Partials:
    return made.copy_out(made.execute(3, made.copy_in(batches)), torch.float32)


@pytest.mark.parametrize("pipeline", BOUNDS)
@pytest.mark.parametrize("tokens", [1, 5, 64, 100, 300, 512, 1300])
def test_error_within_bound(tmp_path: Path, pipeline: Pipeline, tokens: int) -> None:
    made, weights = backend(tmp_path, pipeline)
    batch = host_batch(tokens)
    for _ in range(2):
        partials = compute(made, batch)
        assert relative_error(partials.sums, reference_partials(batch, weights)) < BOUNDS[pipeline]
        ids = batch.expert_ids[batch.expert_ids >= 0]
        assert torch.equal(partials.pairs, ids.bincount(minlength=8).to(torch.int32))


def test_small_batches_one_after_another(tmp_path: Path) -> None:
    made, weights = backend(tmp_path)
    made.warm_up()
    kept = []
    for tokens in (64, 3, 1, 17, 2, 64):
        batch = host_batch(tokens)
        kept.append((compute(made, batch).sums, reference_partials(batch, weights)))
    assert all(relative_error(sums, reference) < BOUNDS["fast"] for sums, reference in kept)


@pytest.mark.parametrize("tokens", [7, 300])
def test_merged_batches_and_bf16_hidden_states(tmp_path: Path, tokens: int) -> None:
    made, weights = backend(tmp_path)
    batches = [host_batch(tokens), host_batch(2 * tokens + 1)]
    expected = torch.cat([reference_partials(batch, weights) for batch in batches])
    assert relative_error(compute(made, *batches).sums, expected) < BOUNDS["fast"]
    wide = [
        replace(batch, hidden=dequantize_activations(batch.hidden, batch.scales).bfloat16(), scales=None)
        for batch in batches
        if batch.scales is not None
    ]
    # BF16 hidden states are quantised on the device, to the bits of the CPU.
    quantized = [TokenBatch(*quantize_activations(b.hidden), b.expert_ids, b.weights) for b in wide]
    expected = torch.cat([reference_partials(batch, weights) for batch in quantized])
    assert relative_error(compute(made, *wide).sums, expected) < BOUNDS["fast"]


def test_batch_invariant(tmp_path: Path) -> None:
    made, _ = backend(tmp_path, batch_invariant=True)
    batch = host_batch(500)
    sums = compute(made, batch).sums
    assert batch.scales is not None
    for count in (1, 2, 63, 200, 301):
        rows = torch.randperm(500)[:count]
        part = TokenBatch(batch.hidden[rows], batch.scales[rows], batch.expert_ids[rows], batch.weights[rows])
        assert torch.equal(compute(made, part).sums, sums[rows])


def test_execute_does_not_wait_for_the_device(tmp_path: Path) -> None:
    made, _ = backend(tmp_path)
    for tokens in (5, 400):
        batch = made.copy_in([host_batch(tokens)])
        made.execute(3, batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            made.execute(3, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_unsupported_shapes_are_named(tmp_path: Path) -> None:
    made, _ = backend(tmp_path)
    with pytest.raises(UnsupportedShape, match="layer 4"):
        made.load_layer(4, random_weights(ExpertShape(4, 1024, 256), CPU))
    with pytest.raises(UnsupportedShape, match="hidden size 8320"):
        CutileBackend(cache=tmp_path / "c").load_layer(0, random_weights(ExpertShape(1, 8320, 128), CPU))
