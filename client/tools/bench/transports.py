"""Calls that want no expert, straight through a transport: what moving their bytes costs."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from expertd.client.tools.bench.floors import Exchange
from expertd.client.tools.bench.report import STAGES, Measurement
from expertd.client.tools.bench.timing import measurement_of, repeat, repeat_here
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.interface import Transport
from expertd.client.transport.segment import Segment, call_bytes, layout_of, segment_bytes
from expertd.client.transport.segment_pool import REGISTRATION_SECONDS
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.kernels.numerics.quantize import quantize_activations
from expertd.proto.codec import ExecuteCall, ShardInfo, StageTimings, encode_call
from expertd.proto.lane.layout import reply_room


def calls_for_nothing(shard: ShardInfo, hidden: Tensor, chunk_tokens: int) -> list[ExecuteCall]:
    """All tokens of `hidden` [T, H] in calls of at most so many; what is computed for them are zeros."""
    choices = len(hidden), 1
    return calls_of(shard, hidden, chunk_tokens, torch.full(choices, -1, dtype=torch.int32), torch.zeros(choices))


def calls_of(shard: ShardInfo, hidden: Tensor, chunk_tokens: int, ids: Tensor, weights: Tensor) -> list[ExecuteCall]:
    """All tokens of `hidden` [T, H], quantised, with ids and weights [T, k], in calls of at most so many."""
    values, scales = quantize_activations(hidden)
    calls = []
    for first in range(0, len(hidden), chunk_tokens):
        rows = slice(first, first + chunk_tokens)
        calls.append(
            ExecuteCall(
                request_id=first + 1,
                model_fingerprint=shard.model_fingerprint,
                placement_epoch=shard.placement_epoch,
                layer=shard.layers[0],
                hidden=values[rows],
                scales=scales[rows],
                expert_ids=ids[rows],
                weights=weights[rows],
                reply_dtype=torch.bfloat16,
            )
        )
    return calls


async def measure_awaited(
    what: str, transport: Transport, calls: Sequence[ExecuteCall], exchange: Exchange, seconds: float
) -> Measurement:
    """Of all `calls` together, awaited."""
    timings: list[StageTimings] = []

    async def execute() -> None:
        results = await asyncio.gather(*map(transport.execute, calls))
        if calls[0].hidden.is_cuda:
            torch.cuda.synchronize()
        timings.append(results[0].timings)

    return _summary(what, calls, exchange, timings, *await repeat(execute, 1, seconds))


async def measure_thread(
    what: str, transport: SharedMemoryTransport, calls: Sequence[ExecuteCall], exchange: Exchange, seconds: float
) -> Measurement:
    """The same from a thread that waits for each answer; calls before have shared as much memory as these need."""
    timings: list[StageTimings] = []

    def call_here() -> None:
        results = [transport.call(call) for call in calls]
        assert results[0] is not None
        timings.append(results[0].timings)

    times, wall = await asyncio.to_thread(repeat_here, call_here, seconds)
    return _summary(what, calls, exchange, timings, times, wall)


async def measure_lane(
    address: str, calls: Sequence[ExecuteCall], experts: int, exchange: Exchange, seconds: float
) -> Measurement:
    """Of the same calls when they are already written, from a thread: only their slots go to and fro."""
    grpc = GrpcTransport(address)
    room = reply_room(experts)
    layouts = [layout_of(call, on_gpu=False) for call in calls]
    registration = await grpc.register_shared_memory(REGISTRATION_SECONDS)
    size = segment_bytes(sum(call_bytes(layout, room) for layout in layouts))
    segment = await Segment.open(address, registration, size, room)
    posts = []
    for call, layout in zip(calls, layouts, strict=True):
        slot = segment.take(layout, None)
        assert slot is not None
        await slot.write(call, None)
        posts.append((slot, encode_call(call, slot.offset)))

    def post_all() -> None:
        for slot, message in posts:
            segment.lane.post(slot.number, message, room)
        for slot, _ in posts:
            segment.lane.wait(slot.number)
            segment.lane.reply(slot.number)

    times, wall = await asyncio.to_thread(repeat_here, post_all, seconds)
    segment.close()
    await grpc.close()
    tokens = sum(len(call.hidden) for call in calls)
    return measurement_of("expertd lane", tokens, 1, times, wall, exchange.total_bytes, {})


def _summary(
    what: str,
    calls: Sequence[ExecuteCall],
    exchange: Exchange,
    timings: Sequence[StageTimings],
    times: list[float],
    wall: float,
) -> Measurement:
    tokens = sum(len(call.hidden) for call in calls)
    stages = {stage: statistics.median(getattr(timing, stage) for timing in timings) for stage in STAGES}
    return measurement_of(what, tokens, 1, times, wall, exchange.total_bytes, stages)
