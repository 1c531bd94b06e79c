"""Stream-ordered calls on a GPU: the bits of gRPC, in graphs and compiled; failures that come as NaN and an error."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from torch import Tensor

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.sync import SyncCoordinator
from expertd.client.tools.cluster import LocalCluster
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.proto.base.errors import InvalidBatch, Unavailable
from tests.gpu.caller import GPU, OPTIONS
from tests.gpu.caller import MODEL as ONE_LAYER
from tests.gpu.stream.replays import replay
from tests.support.fence.markers import gpu_only

pytestmark = [gpu_only, pytest.mark.asyncio(loop_scope="module")]

MODEL = replace(ONE_LAYER, moe_layers=2)
SIZES = (1, 8, 63, 256, 257, 900)
"""The last two are compacted, as there are two servers."""
CONFIGS = {
    "fp8, bf16": CoordinatorConfig(),
    "bf16, fp32": CoordinatorConfig(hidden_dtype=torch.bfloat16, reply_dtype=torch.float32),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    folder = write_demo_checkpoint(tmp_path_factory.mktemp("model"), MODEL)
    async with LocalCluster(folder, ["0-3", "4-7"], OPTIONS) as cluster:
        yield cluster


def arguments(tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, MODEL.hidden_size, device=GPU).to(dtype)
    ids = torch.rand(tokens, 8, device=GPU).argsort(dim=1)[:, :4].contiguous()
    # Some tokens have no experts at all.
    ids[torch.rand(tokens, device=GPU) < 0.2] = -1
    return hidden, ids, torch.rand(tokens, 4, device=GPU)


@pytest.mark.parametrize("name", CONFIGS)
async def test_bits_are_those_of_grpc(cluster: LocalCluster, name: str) -> None:
    config = CONFIGS[name]

    def run() -> None:
        by_grpc = CoordinatorConfig(
            hidden_dtype=config.hidden_dtype, reply_dtype=config.reply_dtype, shared_memory_bytes=0
        )
        with SyncCoordinator(cluster.addresses, config) as moe, SyncCoordinator(cluster.addresses, by_grpc) as grpc:
            moe.prepare_stream(max(SIZES), GPU, timeout=20.0)
            assert moe.stream_on_gpu == {*cluster.addresses}
            for tokens in SIZES:
                for dtype in (torch.bfloat16, torch.float32):
                    hidden, ids, weights = arguments(tokens, dtype)
                    right = grpc(1, hidden.cpu(), topk_ids=ids.cpu(), topk_weights=weights.cpu())
                    for choice in (ids, ids.int()):
                        got = moe.on_stream(1, hidden, choice, weights)
                        moe.check()
                        assert got.dtype == dtype
                        assert torch.equal(got.cpu().to(right.dtype), right), (tokens, dtype)

    await asyncio.to_thread(run)


async def test_graphs_are_replayed_without_a_leak_or_a_wrong_sum(cluster: LocalCluster) -> None:
    await asyncio.to_thread(replay, cluster.addresses, 200, 4)


async def test_a_compiled_step_gives_the_same_bits(cluster: LocalCluster) -> None:
    def run() -> None:
        with SyncCoordinator(cluster.addresses) as moe:
            moe.prepare_stream(8, GPU, timeout=20.0)
            hidden, ids, weights = arguments(5)

            def step(hidden: Tensor) -> Tensor:
                return hidden + moe.on_stream(1, hidden, ids, weights)

            expected = step(hidden)
            assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(hidden), expected)
            moe.check()

    await asyncio.to_thread(run)


async def test_what_is_refused_is_nan_and_raised(cluster: LocalCluster) -> None:
    def run() -> None:
        with SyncCoordinator(cluster.addresses) as moe:
            moe.prepare_stream(8, GPU, timeout=20.0)
            hidden, ids, weights = arguments(5)
            ids[2] = torch.arange(4, device=GPU)
            infinite = weights.clone()
            infinite[2, 1] = torch.inf
            assert moe.on_stream(1, hidden, ids, infinite).isnan().all()
            with pytest.raises(InvalidBatch, match=r"layer 1: weights\[2, 1\] is inf"):
                moe.check()
            assert moe.on_stream(1, hidden, ids, weights).isfinite().all()
            moe.check()

    await asyncio.to_thread(run)


async def test_a_killed_server_holds_no_stream(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = write_demo_checkpoint(tmp_path_factory.mktemp("model"), MODEL)

    def run(address: str, pid: int) -> None:
        with SyncCoordinator([address]) as moe:
            moe.prepare_stream(8, GPU, timeout=20.0)
            hidden, ids, weights = arguments(5)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = moe.on_stream(1, hidden, ids, weights)
            graph.replay()
            moe.check()
            os.kill(pid, signal.SIGSTOP)
            graph.replay()
            time.sleep(0.2)
            os.kill(pid, signal.SIGKILL)
            struck = time.monotonic()
            torch.cuda.synchronize()
            assert time.monotonic() - struck < 1.0
            assert output.isnan().all()
            with pytest.raises(Unavailable, match=f"{address}: layer 1: "):
                moe.check()
            graph.replay()
            torch.cuda.synchronize()
            assert output.isnan().all()

    async with LocalCluster(folder, ["0-7"], OPTIONS) as cluster:
        with pytest.raises(Unavailable):
            await asyncio.to_thread(run, cluster.addresses[0], cluster.servers[0].process.pid)
