"""Calls repeated and timed, for `expertd bench serve`."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping

import torch

from expertd.client.base.quantiles import p50_p99
from expertd.client.tools.bench.report import Comparison, Measurement

LEAST_CALLS = 3


async def repeat(call: Callable[[], Awaitable[None]], callers: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of every call by `callers` at once, at least `LEAST_CALLS` each, and the wall time."""
    await call()
    times: list[float] = []
    started = time.perf_counter()

    async def caller() -> None:
        done = 0
        while done < LEAST_CALLS or time.perf_counter() - started < seconds:
            begun = time.perf_counter()
            await call()
            times.append(time.perf_counter() - begun)
            done += 1

    await asyncio.gather(*(caller() for _ in range(callers)))
    return times, time.perf_counter() - started


def repeat_here(call: Callable[[], None], seconds: float) -> tuple[list[float], float]:
    """Like `repeat`, of calls that wait on this thread."""
    call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < LEAST_CALLS or time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return times, time.perf_counter() - started


def repeat_on_stream(call: Callable[[], None], seconds: float) -> tuple[list[float], float]:
    """Like `repeat_here`, of work on the current CUDA stream, by that stream's clock."""
    call()
    times: list[float] = []
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    started = time.perf_counter()
    while len(times) < LEAST_CALLS or time.perf_counter() - started < seconds:
        before.record()
        call()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return times, time.perf_counter() - started


async def in_turn(calls: Mapping[str, Callable[[], Awaitable[None]]], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, one of each after another, so that what else the machine does slows all of them down."""
    times: dict[str, list[float]] = {name: [] for name in calls}

    async def each() -> None:
        for name, call in calls.items():
            begun = time.perf_counter()
            await call()
            times[name].append(time.perf_counter() - begun)

    await repeat(each, 1, seconds * len(calls))
    return times


def in_turn_here(calls: Mapping[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Like `in_turn`, of calls that wait on this thread."""
    times: dict[str, list[float]] = {name: [] for name in calls}

    def each() -> None:
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)

    repeat_here(each, seconds * len(calls))
    return times


def compare(
    transport: str, tokens: int, times: Mapping[str, list[float]], parts: Mapping[str, float] | None = None
) -> list[Comparison]:
    """Everything beside the first of `times`."""
    base = statistics.median(next(iter(times.values())))
    return [comparison_of(transport, what, tokens, mine, base, parts or {}) for what, mine in times.items()]


def comparison_of(
    transport: str, what: str, tokens: int, times: list[float], base: float, parts: Mapping[str, float]
) -> Comparison:
    """Beside what takes `base` seconds."""
    p50, p99 = p50_p99(times)
    return Comparison(transport, what, tokens, len(times), p50, p99, p50 / base, dict(parts))


def measurement_of(
    what: str, tokens: int, callers: int, times: list[float], wall: float, call_bytes: int, stages: dict[str, float]
) -> Measurement:
    p50, p99 = p50_p99(times)
    return Measurement(
        what=what,
        tokens=tokens,
        callers=callers,
        calls=len(times),
        p50=p50,
        p99=p99,
        gigabytes_per_second=call_bytes * len(times) / wall / 1e9,
        tokens_per_second=tokens * len(times) / wall,
        stages=stages,
    )
