"""Calls of many sizes by many callers, beside what the same bytes cost without expertd."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.tools.bench.floors import EchoAddresses, Exchange, GrpcFloor, memcpy_seconds, raw_socket_seconds
from expertd.client.tools.bench.report import STAGES, Measurement
from expertd.client.tools.bench.servers import Way
from expertd.client.tools.bench.stream import measure_stream
from expertd.client.tools.bench.timing import measurement_of, repeat
from expertd.client.tools.bench.transports import (
    calls_for_nothing,
    calls_of,
    measure_awaited,
    measure_lane,
    measure_thread,
)
from expertd.client.transport.interface import Transport
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.proto.codec import ShardInfo, StageTimings
from expertd.proto.lane.layout import rows_bytes

FLOORS = {"grpc": "grpc echo", "unix": "grpc echo", "shm": "raw socket"}
"""By transport, what moving the same bytes is compared with; in the memory of a GPU none are moved."""


@dataclass(frozen=True, slots=True)
class Floors:
    """What measures the floors."""

    echo: EchoAddresses
    grpc: GrpcFloor
    config: CoordinatorConfig
    seconds: float

    def exchange(self, hidden_size: int, tokens: int, top_k: int = 1) -> Exchange:
        """The bytes of a call, cut like the coordinator cuts them."""
        config = self.config
        chunk = min(tokens, config.chunk_tokens(hidden_size, config.chunk_bytes))
        up = rows_bytes(config.hidden_dtype, chunk, hidden_size) + 8 * top_k * chunk
        return Exchange(up, rows_bytes(config.reply_dtype, chunk, hidden_size), -(-tokens // chunk))

    async def measure(self, exchange: Exchange, tokens: int) -> AsyncIterator[Measurement]:
        """The echo, the raw socket and a copy of an exchange for so many tokens."""
        times, wall = await repeat(lambda: self.grpc.exchange(exchange), 1, self.seconds)
        yield measurement_of("grpc echo", tokens, 1, times, wall, exchange.total_bytes, {})
        calls = max(5, min(1000, len(times)))
        for what, measure in (
            ("raw socket", lambda: raw_socket_seconds(self.echo.raw, exchange, calls)),
            ("memcpy", lambda: memcpy_seconds(exchange, calls)),
        ):
            seconds = await asyncio.to_thread(measure)
            yield measurement_of(what, tokens, 1, seconds, sum(seconds), exchange.total_bytes, {})


async def measure_calls(
    floors: Floors, ways: Sequence[Way], tokens: int, callers: Sequence[int]
) -> AsyncIterator[Measurement]:
    """The floors of calls of `tokens` tokens, then every way with every number of callers; without any, no experts."""
    exchange = floors.exchange(ways[0].moe.model.hidden_size, tokens)
    below: dict[str, float] = {}
    async for row in floors.measure(exchange, tokens):
        below[row.what] = row.p50
        yield row
    for way in ways:
        if way.most_tokens is not None and tokens > way.most_tokens:
            continue
        hidden = torch.randn(tokens, way.moe.model.hidden_size, device=way.device)
        moved = below.get(FLOORS.get(way.transport, ""), 0.0)
        async for row in _measure(way, hidden, exchange, callers, floors.seconds):
            yield _beside_floor(row, moved)


def _measure(
    way: Way, hidden: Tensor, exchange: Exchange, callers: Sequence[int], seconds: float
) -> AsyncIterator[Measurement]:
    if not callers:
        return _nothing(way, hidden, exchange, seconds)
    if way.transport == "stream":
        return measure_stream(way, hidden, exchange, seconds)
    return _coordinator(way, hidden, exchange, callers, seconds)


def _beside_floor(row: Measurement, moved: float) -> Measurement:
    floor = moved + row.stages.get("compute", 0.0)
    if row.callers > 1 or not floor:
        return row
    call = None if row.call_p50 is None else row.call_p50 / floor
    return replace(row, over_floor=row.p50 / floor, call_over_floor=call)


async def _nothing(way: Way, hidden: Tensor, exchange: Exchange, seconds: float) -> AsyncIterator[Measurement]:
    """Of calls that want no expert, straight through the transport."""
    (transport,) = way.moe.transports
    shard, chunk = await _parts(way, transport, hidden)
    calls = calls_for_nothing(shard, hidden, chunk)
    what = f"expertd {way.transport}"
    yield await measure_awaited(what, transport, calls, exchange, seconds)
    if isinstance(transport, SharedMemoryTransport) and not hidden.is_cuda:
        yield await measure_thread(f"{what} thread", transport, calls, exchange, seconds)
    if way.transport == "shm":
        yield await measure_lane(transport.address, calls, shard.routed_experts, exchange, seconds)


async def _coordinator(
    way: Way, hidden: Tensor, exchange: Exchange, callers: Sequence[int], seconds: float
) -> AsyncIterator[Measurement]:
    experts, tokens = way.moe.model.n_routed_experts, len(hidden)
    ids, weights = torch.randint(experts, (tokens, 1)), torch.rand(tokens, 1)
    call = await _straight(way, hidden, ids, weights, exchange, seconds) if 1 in callers else None
    hidden = hidden.bfloat16()
    timings: list[StageTimings] = []

    async def execute() -> None:
        result = await way.moe.execute(way.moe.layers[0], hidden, topk_ids=ids, topk_weights=weights)
        way.settle()
        timings.append(result.servers[0].timings)

    for count in callers:
        await execute()
        timings.clear()
        times, wall = await repeat(execute, count, seconds)
        stages = {stage: statistics.median(getattr(timing, stage) for timing in timings) for stage in STAGES}
        row = measurement_of(f"expertd {way.transport}", tokens, count, times, wall, exchange.total_bytes, stages)
        yield replace(row, call_p50=call if count == 1 else None)


async def _straight(
    way: Way, hidden: Tensor, ids: Tensor, weights: Tensor, exchange: Exchange, seconds: float
) -> float | None:
    """Median seconds of the same request without a coordinator; None with several servers, which it is for."""
    if len(way.moe.transports) > 1:
        return None
    (transport,) = way.moe.transports
    shard, chunk = await _parts(way, transport, hidden)
    calls = calls_of(shard, hidden, chunk, ids.int(), weights)
    return (await measure_awaited("", transport, calls, exchange, seconds)).p50


async def _parts(way: Way, transport: Transport, hidden: Tensor) -> tuple[ShardInfo, int]:
    """The only server's shard, and how many tokens go into one call."""
    config = way.moe.config
    shard = await transport.get_shard(config.connect_timeout)
    return shard, min(config.chunk_tokens(hidden.shape[1], transport.chunk_bytes), shard.max_tokens_per_request)
