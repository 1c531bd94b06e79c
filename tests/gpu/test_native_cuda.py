"""The native executor on a GPU: the bits of `CutileBackend.submit`, for every size class, dtype and layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.tools.inputs import random_batch
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.numerics.quantize import FP8, dequantize_activations
from tests.gpu.native_gpu import NativeRig
from tests.support.markers import gpu_only

pytestmark = gpu_only

SHAPE = ExpertShape(8, 1024, 256)
CPU = torch.device("cpu")
LAYERS = 3
MAX_TOKENS = 1024
TOKENS = (1, 5, 8, 63, 64, 100, 255, 256, 257, 900, 1024)
# Not those whose last part of 512 has at most 256: padded, it is computed in the configuration of another class.


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeRig]:
    """Half as many tokens at once as a batch may have, so that the largest are computed in parts."""
    rig = NativeRig(tmp_path_factory.mktemp("rig"), SHAPE, LAYERS, MAX_TOKENS, max_tokens=MAX_TOKENS // 2)
    yield rig
    rig.close()


def host_batch(tokens: int, hidden: torch.dtype, top_k: int = 8) -> TokenBatch:
    batch = random_batch(SHAPE, tokens, CPU, model_experts=16, top_k=top_k)
    if hidden == FP8:
        return batch
    assert batch.scales is not None
    return replace(batch, hidden=dequantize_activations(batch.hidden, batch.scales).bfloat16(), scales=None)


def check(rig: NativeRig, layer: int, batches: list[TokenBatch], reply: torch.dtype, *, pinned: bool = False) -> None:
    expected = rig.backend.submit(layer, batches, reply).result()
    torch.cuda.synchronize()
    rig.poison()
    sums, pairs = rig.compute(layer, batches, reply, pinned=pinned)
    for got, wanted in zip(sums, expected.sums, strict=True):
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(pairs, expected.pairs)


@pytest.mark.parametrize("hidden", [FP8, torch.bfloat16])
@pytest.mark.parametrize("reply", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", TOKENS)
def test_bits_of_a_lone_request(rig: NativeRig, tokens: int, hidden: torch.dtype, reply: torch.dtype) -> None:
    for layer, pinned in product((0, 2, 1, 1), (False, True)):
        check(rig, layer, [host_batch(tokens, hidden)], reply, pinned=pinned)


@pytest.mark.parametrize("sizes", [(1, 2, 3), (60, 1, 3), (200, 400, 1, 300), (100, 100)])
def test_bits_of_merged_requests(rig: NativeRig, sizes: tuple[int, ...]) -> None:
    for layer, pinned in product(range(LAYERS), (False, True)):
        check(rig, layer, [host_batch(tokens, FP8) for tokens in sizes], torch.bfloat16, pinned=pinned)


@pytest.mark.parametrize("tokens", [1, 64, 900])
def test_fewer_experts_a_token_than_graphs_have(rig: NativeRig, tokens: int) -> None:
    check(rig, 1, [host_batch(tokens, FP8, top_k=2)], torch.bfloat16)


def test_two_bays_at_once(rig: NativeRig) -> None:
    for _ in range(20):
        batches = [host_batch(tokens, FP8) for tokens in (900, 800)]
        expected = [rig.backend.submit(i, [batch], torch.bfloat16).result() for i, batch in enumerate(batches)]
        torch.cuda.synchronize()
        rig.poison()
        jobs = [rig.start(i, [batch], torch.bfloat16) for i, batch in enumerate(batches)]
        rig.wait(jobs)
        for job, wanted in zip(jobs, expected, strict=True):
            assert torch.equal(job.sums[0], wanted.sums[0])
            assert torch.equal(job.pairs, wanted.pairs)


def test_timings_are_measured(rig: NativeRig) -> None:
    for tokens in (8, 1024):
        job = rig.start(0, [host_batch(tokens, FP8)], torch.bfloat16)
        rig.wait([job])
        assert job.native.measured
        assert all(0 < seconds < 0.1 for seconds in job.native.timings)


def test_the_dequant_pipeline_in_graphs(tmp_path: Path) -> None:
    rig = NativeRig(tmp_path, SHAPE, 2, 64, max_tokens=64, pipeline="dequant")
    for tokens, layer in product((1, 8, 64), (0, 1, 0)):
        batch = host_batch(tokens, FP8)
        for reply in (torch.bfloat16, torch.float32):
            check(rig, layer, [batch], reply)
    rig.close()
