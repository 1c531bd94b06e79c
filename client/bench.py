"""`expertd bench serve`: latency and throughput of a server, beside what the same bytes cost without it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import uvloop
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from expertd.client.cluster import LocalCluster, cache_folder
from expertd.client.config import CoordinatorConfig
from expertd.client.coordinator import Coordinator, MoeResult
from expertd.client.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.client.floors import Exchange, GrpcFloor, memcpy_seconds, raw_socket_seconds, running_echo
from expertd.client.quantiles import p50_p99
from expertd.proto.codec import StageTimings

TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
CALLERS = (1, 4, 16, 64)
LOCAL_EXPERTS = 32
STAGES = tuple(StageTimings.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Calls of one size by one number of callers, or the same bytes over a floor."""

    what: str
    """expertd, grpc echo, raw socket or memcpy."""
    tokens: int
    callers: int
    calls: int
    p50: float
    """Seconds."""
    p99: float
    gigabytes_per_second: float
    """Request and reply bytes of all callers over the wall time."""
    tokens_per_second: float
    stages: dict[str, float]
    """Median seconds in each stage of the server."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--servers", nargs="+", metavar="HOST:PORT", help="running servers (default: one of its own)")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help=f"batch sizes (default: {TOKENS})")
    parser.add_argument("--callers", type=int, nargs="+", default=list(CALLERS), help=f"callers (default: {CALLERS})")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement (default: 2)")
    parser.add_argument("--hidden-size", type=int, default=7168, help="of its own server's model (default: 7168)")
    parser.add_argument("--intermediate-size", type=int, default=2048, help="likewise (default: 2048)")
    parser.add_argument("--backend", default="auto", help="of its own server (default: auto)")
    parser.add_argument("--channels", type=int, default=CoordinatorConfig().channels, help="connections to a server")
    parser.add_argument("--chunk-bytes", type=int, default=CoordinatorConfig().chunk_bytes, help="largest message")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")


def run(arguments: argparse.Namespace) -> int:
    """0; the table goes to standard output, progress to standard error."""
    uvloop.run(_bench(arguments))
    return 0


async def _bench(arguments: argparse.Namespace) -> None:
    config = CoordinatorConfig(channels=arguments.channels, chunk_bytes=arguments.chunk_bytes)
    async with contextlib.AsyncExitStack() as stack:
        servers = arguments.servers
        # Processes first: gRPC does not like forks once it runs.
        echo = await stack.enter_async_context(running_echo())
        if servers is None:
            servers = (await stack.enter_async_context(_own_server(arguments))).addresses
        moe = await stack.enter_async_context(Coordinator(servers, config))
        floor = GrpcFloor(echo.grpc, config.channels)
        stack.push_async_callback(floor.close)
        cases = [(tokens, callers) for tokens in arguments.tokens for callers in arguments.callers]
        progress = stack.enter_context(Progress(console=Console(file=sys.stderr)))
        task = progress.add_task("measuring", total=len(cases) + 3 * len(arguments.tokens))
        rows = []
        for tokens in arguments.tokens:
            exchange = _exchange(config, moe.model.hidden_size, tokens)
            rows.append(await _measure_floor(floor, exchange, tokens, arguments.seconds))
            progress.advance(task)
            calls = max(5, min(1000, int(rows[-1].calls)))
            for what, measure in (
                ("raw socket", lambda: raw_socket_seconds(echo.raw, exchange, calls)),  # noqa: B023
                ("memcpy", lambda: memcpy_seconds(exchange, calls)),  # noqa: B023
            ):
                seconds = await asyncio.to_thread(measure)
                rows.append(_summary(what, tokens, 1, seconds, sum(seconds), exchange.total_bytes, {}))
                progress.advance(task)
            for callers in arguments.callers:
                rows.append(await _measure_server(moe, config, tokens, callers, arguments.seconds))
                progress.advance(task)
    _print_table(rows, _title(config))
    if arguments.json is not None:
        machine = {"cores": os.cpu_count(), "machine": platform.platform(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2))


def _own_server(arguments: argparse.Namespace) -> LocalCluster:
    """One server with 32 experts, of which every token needs one: the share of a server among eight."""
    model = DemoModel(
        hidden_size=arguments.hidden_size,
        moe_intermediate_size=arguments.intermediate_size,
        n_routed_experts=LOCAL_EXPERTS,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        moe_layers=1,
    )
    folder = write_demo_checkpoint(cache_folder() / "bench", model)
    # On the CPU one core is left to the coordinator.
    options = ["--backend", arguments.backend, "--threads", str(max(1, (os.cpu_count() or 2) - 1))]
    return LocalCluster(folder, [f"0-{LOCAL_EXPERTS - 1}"], options)


def _exchange(config: CoordinatorConfig, hidden_size: int, tokens: int) -> Exchange:
    """The bytes of a call with one expert a token, cut like the coordinator cuts them."""
    chunk = min(tokens, config.chunk_tokens(hidden_size, shares_memory=False))
    scales = hidden_size // 128 * 4 if config.hidden_dtype == torch.float8_e4m3fn else 0
    up = hidden_size * config.hidden_dtype.itemsize + scales + 8
    return Exchange(up * chunk, hidden_size * config.reply_dtype.itemsize * chunk, -(-tokens // chunk))


async def _measure_floor(floor: GrpcFloor, exchange: Exchange, tokens: int, seconds: float) -> Measurement:
    times, wall = await _repeat(lambda: floor.exchange(exchange), 1, seconds)
    return _summary("grpc echo", tokens, 1, times, wall, exchange.total_bytes, {})


async def _measure_server(
    moe: Coordinator, config: CoordinatorConfig, tokens: int, callers: int, seconds: float
) -> Measurement:
    hidden = torch.randn(tokens, moe.model.hidden_size).bfloat16()
    experts = moe.model.n_routed_experts
    ids, weights = torch.randint(experts, (tokens, 1)), torch.rand(tokens, 1)
    results: list[MoeResult] = []

    async def call() -> None:
        results.append(await moe.execute(moe.layers[0], hidden, topk_ids=ids, topk_weights=weights))

    await call()
    results.clear()
    times, wall = await _repeat(call, callers, seconds)
    stages = {
        stage: statistics.median(getattr(result.servers[0].timings, stage) for result in results) for stage in STAGES
    }
    total_bytes = _exchange(config, moe.model.hidden_size, tokens).total_bytes
    return _summary("expertd", tokens, callers, times, wall, total_bytes, stages)


async def _repeat(call: Callable[[], Awaitable[None]], callers: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of every call by `callers` at once, at least three each, and the wall time."""
    await call()
    times: list[float] = []
    started = time.perf_counter()

    async def caller() -> None:
        done = 0
        while done < 3 or time.perf_counter() - started < seconds:
            begun = time.perf_counter()
            await call()
            times.append(time.perf_counter() - begun)
            done += 1

    await asyncio.gather(*(caller() for _ in range(callers)))
    return times, time.perf_counter() - started


def _summary(
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


def _title(config: CoordinatorConfig) -> str:
    return f"{config.channels} channels, messages of at most {config.chunk_bytes} bytes"


def _print_table(rows: list[Measurement], title: str) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    columns = ("tokens", "what", "callers", "calls", "p50 ms", "p99 ms", "GB/s", "tokens/s", *STAGES)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.tokens),
            row.what,
            str(row.callers),
            str(row.calls),
            f"{row.p50 * 1e3:.3f}",
            f"{row.p99 * 1e3:.3f}",
            f"{row.gigabytes_per_second:.3f}",
            f"{row.tokens_per_second:.0f}",
            *(f"{row.stages[stage] * 1e3:.3f}" if row.stages else "" for stage in STAGES),
        )
    Console(width=150).print(table)
