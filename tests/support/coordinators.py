"""What coordinators are asked in tests, and the oracle's answers; servers are those of the small model."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.transport.segment import Segment
from expertd.client.transport.shared_memory import HOST, SharedMemoryTransport
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.oracle.reference import reference_partials, relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import load_layer
from tests.support.fence.wrong import wrong

T = TypeVar("T")
LAYER, HIDDEN, EXPERTS, TOP_K = 1, 256, 16, 4
EXACT = CoordinatorConfig(hidden_dtype=torch.bfloat16, reply_dtype=torch.float32, output_dtype=torch.float32)
QUICK = replace(EXACT, connect_timeout=1.0)


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()


def routing(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    return ids, torch.rand(count, TOP_K, generator=generator)


def oracle(model: Path, hidden: Tensor, ids: Tensor, weights: Tensor, layer: int = LAYER) -> Tensor:
    with Checkpoint(model) as checkpoint:
        loaded = load_layer(checkpoint, layer, range(EXPERTS), lambda _: None)
    return reference_partials(TokenBatch(hidden, None, ids.int(), weights), loaded)


async def call(moe: Coordinator, seed: int = 0, count: int = 20) -> Tensor:
    ids, weights = routing(count, seed)
    return await moe(LAYER, tokens(count, seed), topk_ids=ids, topk_weights=weights)


async def on_stream(moe: Coordinator, *tensors: Tensor, layer: int = LAYER) -> Tensor:
    """On a thread: as a simulated device computes, it waits, and the coordinator must go on."""
    return await asyncio.to_thread(moe.on_stream, layer, *tensors)


def expected(model: Path, seed: int = 0, count: int = 20) -> Tensor:
    return oracle(model, tokens(count, seed), *routing(count, seed))


async def right_until(done: asyncio.Task[T], moe: Coordinator, right: Tensor, holds: Callable[[], bool]) -> T:
    """What is `done`; until then, and once more, calls are answered like `right`, as `expected` is, and it `holds`."""
    while not done.done():
        await _is_right(moe, right)
        assert holds()
        await asyncio.sleep(0.001)
    await _is_right(moe, right)
    return await done


async def _is_right(moe: Coordinator, right: Tensor) -> None:
    off = relative_error(await call(moe), right)
    assert off < 1e-5, wrong(f"relative error {off}")


def segments_of(transport: SharedMemoryTransport) -> list[Segment]:
    return list(transport._pools[HOST].segments)


def free_bytes(segment: Segment) -> int:
    """With the lane's ring, which no call takes."""
    return segment.lane.data + segment.lane.free_bytes
