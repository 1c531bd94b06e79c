"""Stream-ordered calls, by the clock of the caller's CUDA stream: one by one, and replayed from a CUDA graph."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Callable

import torch
from torch import Tensor

from expertd.client.tools.bench.floors import Exchange
from expertd.client.tools.bench.report import Measurement
from expertd.client.tools.bench.servers import Way
from expertd.client.tools.bench.timing import LEAST_CALLS, measurement_of, repeat_on_stream


async def measure_stream(way: Way, hidden: Tensor, exchange: Exchange, seconds: float) -> AsyncIterator[Measurement]:
    """Calls of `hidden` [T, H] on `way.device`, of one caller, each from before it to after it on the stream.

    Beside them is what servers compute for the same tokens, as they tell it of other calls.
    """
    moe, hidden = way.moe, hidden.bfloat16()
    tensors = hidden, *_choices(way, len(hidden))
    computing = {"compute": await _computing(way, *tensors)}
    out = torch.empty_like(hidden)

    def call() -> None:
        moe.on_stream(moe.layers[0], *tensors, out)

    for what, prepare in (("expertd stream", _as_it_is), ("expertd stream graph", captured)):
        times, wall = await asyncio.to_thread(_repeat, prepare, call, seconds)
        # A call that failed was none.
        await moe.check()
        yield measurement_of(what, len(hidden), 1, times, wall, exchange.total_bytes, computing)


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """`call` as a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _as_it_is(call: Callable[[], None]) -> Callable[[], None]:
    return call


def _repeat(
    prepare: Callable[[Callable[[], None]], Callable[[], None]], call: Callable[[], None], seconds: float
) -> tuple[list[float], float]:
    return repeat_on_stream(prepare(call), seconds)


def _choices(way: Way, tokens: int) -> tuple[Tensor, Tensor]:
    """Ids and weights [T, k], with one expert for each token, as other transports are measured."""
    model = way.moe.model
    ids = torch.full((tokens, model.num_experts_per_tok), -1)
    ids[:, 0] = torch.randint(model.n_routed_experts, (tokens,))
    return ids.to(way.device), torch.rand(ids.shape).to(way.device)


async def _computing(way: Way, hidden: Tensor, ids: Tensor, weights: Tensor) -> float:
    """Median seconds of the server that computes longest."""
    seconds = []
    for _ in range(LEAST_CALLS):
        result = await way.moe.execute(way.moe.layers[0], hidden, topk_ids=ids, topk_weights=weights)
        seconds.append(max(server.timings.compute for server in result.servers))
    return statistics.median(seconds)
