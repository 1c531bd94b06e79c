"""The native executor on a GPU: the bits of kernels launched one by one, for every size class, dtype and layer."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.pipeline.arithmetic import Pipeline
from expertd.kernels.cutile.run.backend import CutileBackend
from expertd.kernels.cutile.tools.inputs import random_batch
from expertd.kernels.numerics.backend import Computed, TokenBatch
from expertd.kernels.numerics.quantize import FP8, dequantize_activations
from tests.gpu.bench.executor import eager, loaded, placed, poison
from tests.support.fence.markers import gpu_only

pytestmark = gpu_only

SHAPE = ExpertShape(8, 1024, 256)
CPU = torch.device("cpu")
LAYERS = 3
MAX_TOKENS = 1024
TOKENS = (1, 5, 8, 63, 64, 100, 255, 256, 257, 900, 1024)
PLACES = ("pageable", "pinned", "device")
ON_PEER = 3
"""What the executor is told of memory of another GPU."""


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> CutileBackend:
    """Half as many tokens at once as a batch may have, so that the largest are computed in parts."""
    return loaded(tmp_path_factory.mktemp("backend"), SHAPE, LAYERS, MAX_TOKENS, max_tokens=MAX_TOKENS // 2)


def host_batch(tokens: int, hidden: torch.dtype, top_k: int = 8) -> TokenBatch:
    batch = random_batch(SHAPE, tokens, CPU, model_experts=16, top_k=top_k)
    if hidden == FP8:
        return batch
    assert batch.scales is not None
    return replace(batch, hidden=dequantize_activations(batch.hidden, batch.scales).bfloat16(), scales=None)


def equal(got: Computed, wanted: Computed) -> None:
    for mine, its in zip(got.sums, wanted.sums, strict=True):
        assert torch.equal(mine.cpu().view(torch.uint8), its.cpu().view(torch.uint8))
    assert torch.equal(got.pairs, wanted.pairs)


def check(backend: CutileBackend, layer: int, batches: list[TokenBatch], reply: torch.dtype, *places: str) -> None:
    batches = [placed(batch, place, reply) for batch, place in zip(batches, places, strict=True)]
    expected = eager(backend, layer, batches, reply)
    poison(backend)
    # The executor's streams wait for nobody's but their own.
    torch.cuda.synchronize()
    equal(backend.submit(layer, batches, reply).result(), expected)


@pytest.mark.parametrize("hidden", [FP8, torch.bfloat16])
@pytest.mark.parametrize("reply", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", TOKENS)
def test_bits_of_a_lone_request(backend: CutileBackend, tokens: int, hidden: torch.dtype, reply: torch.dtype) -> None:
    for layer, place in product((0, 2, 1, 1), PLACES):
        check(backend, layer, [host_batch(tokens, hidden)], reply, place)


@pytest.mark.parametrize("sizes", [(1, 2, 3), (60, 1, 3), (200, 400, 1, 300), (100, 100)])
def test_bits_of_merged_requests(backend: CutileBackend, sizes: tuple[int, ...]) -> None:
    for layer, first in product(range(LAYERS), range(len(PLACES))):
        alike = [PLACES[first]] * len(sizes)
        mixed = [PLACES[(first + index) % len(PLACES)] for index in range(len(sizes))]
        for places in (alike, mixed):
            batches = [host_batch(tokens, FP8) for tokens in sizes]
            check(backend, layer, batches, torch.bfloat16, *places)


@pytest.mark.parametrize("tokens", [1, 64, 900])
def test_fewer_experts_a_token_than_graphs_have(backend: CutileBackend, tokens: int) -> None:
    check(backend, 1, [host_batch(tokens, FP8, top_k=2)], torch.bfloat16, "pageable")


def test_two_bays_at_once(backend: CutileBackend) -> None:
    for places in product(PLACES, repeat=2):
        for _ in range(7):
            batches = [
                placed(host_batch(tokens, FP8), place, torch.bfloat16)
                for tokens, place in zip((900, 800), places, strict=True)
            ]
            expected = [eager(backend, layer, [batch], torch.bfloat16) for layer, batch in enumerate(batches)]
            poison(backend)
            under_way = [backend.submit(layer, [batch], torch.bfloat16) for layer, batch in enumerate(batches)]
            for batch, wanted in zip(under_way, expected, strict=True):
                equal(batch.result(), wanted)


def test_timings_are_measured(backend: CutileBackend) -> None:
    for tokens in (8, 1024):
        for _ in range(8):
            batch = backend.submit(0, [host_batch(tokens, FP8)], torch.bfloat16)
            copy_in, compute, copy_out = batch.result().seconds
            assert 0 < compute < 0.1
            assert 0 <= min(copy_in, copy_out) <= max(copy_in, copy_out) < 0.1
            if batch.native.measured:
                break
        assert batch.native.measured


@pytest.mark.parametrize("hidden", [FP8, torch.bfloat16])
def test_large_batches_of_host_memory_in_parts_that_overlap(tmp_path: Path, hidden: torch.dtype) -> None:
    backend = loaded(tmp_path, ExpertShape(8, 256, 128), 1, 16384)
    for tokens, place in product((4097, 9000, 16384), PLACES):
        batch = random_batch(ExpertShape(8, 256, 128), tokens, CPU, model_experts=16)
        if hidden != FP8:
            assert batch.scales is not None
            batch = replace(batch, hidden=dequantize_activations(batch.hidden, batch.scales).bfloat16(), scales=None)
        check(backend, 0, [batch], torch.bfloat16, place)


@pytest.mark.parametrize("hidden", [FP8, torch.bfloat16])
def test_sums_that_another_gpu_gets_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: torch.dtype
) -> None:
    """Bits alone: as if this GPU's memory were another one's."""
    backend = loaded(tmp_path, SHAPE, 2, 16384)
    monkeypatch.setattr("expertd.kernels.cutile.run.batch._reach", lambda *_: ON_PEER)
    for tokens, layer in product((256, 4096, 5000, 16384), (0, 1)):
        for reply in (torch.bfloat16, torch.float32):
            check(backend, layer, [host_batch(tokens, hidden)], reply, "device")


@pytest.mark.parametrize("pipeline", ["fast", "dequant"])
def test_every_size_class_is_a_graph(tmp_path: Path, pipeline: Pipeline) -> None:
    """The bits of a graph that is told of another layer, and of addresses that it was not captured with."""
    backend = loaded(tmp_path, SHAPE, 2, 16384, pipeline=pipeline)
    assert len(backend._graphs) == 4 * len(backend.native_executor().classes) == 36
    for tokens, layer in product((1, 8, 64, 256, 1024, 2048, 4096), (0, 1)):
        batch = host_batch(tokens, FP8)
        for reply, place in product((torch.bfloat16, torch.float32), ("pageable", "device")):
            check(backend, layer, [batch], reply, place)
    for tokens in (8192, 16384):
        check(backend, 1, [host_batch(tokens, FP8)], torch.bfloat16, "device")


@pytest.mark.parametrize("hidden", [FP8, torch.bfloat16])
def test_small_batches_beside_large_ones_change_no_bit_of_either(backend: CutileBackend, hidden: torch.dtype) -> None:
    reply = torch.bfloat16
    large, small = ([placed(host_batch(tokens, hidden), "pinned", reply)] for tokens in (MAX_TOKENS, 60))
    wanted = eager(backend, 0, large, reply), eager(backend, 1, small, reply)
    poison(backend)
    torch.cuda.synchronize()
    for _ in range(50):
        both = backend.submit(0, large, reply), backend.submit(1, small, reply)
        for got, expected in zip(both, wanted, strict=True):
            equal(got.result(), expected)
