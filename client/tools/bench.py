"""`expertd bench serve`: latency and throughput of a server, beside what the same bytes cost without it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
import uvloop
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from expertd.client.base.quantiles import p50_p99
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.tools.bench_report import STAGES, Measurement, draw, print_table
from expertd.client.tools.cluster import LocalCluster
from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.client.tools.floors import (
    EchoAddresses,
    Exchange,
    GrpcFloor,
    memcpy_seconds,
    raw_socket_seconds,
    running_echo,
)
from expertd.kernels.weights.files import cache_folder
from expertd.proto.base.malloc import keep_freed_memory
from expertd.proto.codec import StageTimings

TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
CALLERS = (1, 4, 16, 64)
TRANSPORTS = ("grpc", "unix", "shm", "cuda")
LOCAL_EXPERTS = 32


class BenchError(Exception):
    """What was asked for cannot be measured here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--servers", nargs="+", metavar="ADDRESS", help="running servers (default: one of its own)")
    parser.add_argument(
        "--transport",
        nargs="+",
        choices=TRANSPORTS,
        help="gRPC, gRPC over a unix socket (its own server only), shared memory, memory of the server's GPU"
        " (default: all that there are)",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help=f"batch sizes (default: {TOKENS})")
    parser.add_argument("--callers", type=int, nargs="+", default=list(CALLERS), help=f"callers (default: {CALLERS})")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement (default: 2)")
    parser.add_argument("--hidden-size", type=int, default=7168, help="of its own server's model (default: 7168)")
    parser.add_argument("--intermediate-size", type=int, default=2048, help="likewise (default: 2048)")
    parser.add_argument("--backend", default="auto", help="of its own server (default: auto)")
    parser.add_argument("--channels", type=int, default=CoordinatorConfig().channels, help="connections to a server")
    parser.add_argument("--chunk-bytes", type=int, default=CoordinatorConfig().chunk_bytes, help="largest gRPC message")
    parser.add_argument(
        "--shared-memory-chunk-bytes",
        type=int,
        default=CoordinatorConfig().shared_memory_chunk_bytes,
        help="largest call through shared memory",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG to draw them to; needs the extra 'plot'")


def run(arguments: argparse.Namespace) -> int:
    """0, or 2 for what cannot be measured; the table goes to standard output, progress to standard error."""
    try:
        if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise BenchError("--plot needs matplotlib, which is not installed; pip install 'expertd[plot]'")
        keep_freed_memory()
        uvloop.run(_bench(arguments))
    except BenchError as error:
        print(f"expertd bench serve: error: {error}", file=sys.stderr)
        return 2
    return 0


async def _bench(arguments: argparse.Namespace) -> None:
    config = CoordinatorConfig(
        channels=arguments.channels,
        chunk_bytes=arguments.chunk_bytes,
        shared_memory_chunk_bytes=arguments.shared_memory_chunk_bytes,
    )
    async with contextlib.AsyncExitStack() as stack:
        # Processes first: gRPC does not like forks once it runs.
        echo = await stack.enter_async_context(running_echo())
        moes = await _connect(stack, arguments, config)
        floor = GrpcFloor(echo.grpc, config.channels)
        stack.push_async_callback(floor.close)
        progress = stack.enter_context(Progress(console=Console(file=sys.stderr)))
        rounds = len(arguments.tokens) * (3 + len(moes) * len(arguments.callers))
        task = progress.add_task("measuring", total=rounds)
        rows = []
        for tokens in arguments.tokens:
            async for row in _measure(echo, floor, moes, config, tokens, arguments):
                rows.append(row)
                progress.advance(task)
    print_table(rows, _title(config))
    if arguments.json is not None:
        machine = {"cores": os.cpu_count(), "machine": platform.platform(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2))
    if arguments.plot is not None:
        draw(rows, _title(config), arguments.plot)


async def _measure(
    echo: EchoAddresses,
    floor: GrpcFloor,
    moes: Mapping[str, Coordinator],
    config: CoordinatorConfig,
    tokens: int,
    arguments: argparse.Namespace,
) -> AsyncIterator[Measurement]:
    """The floors of calls of `tokens` tokens, then every transport with every number of callers."""
    exchange = _exchange(config, next(iter(moes.values())).model.hidden_size, tokens)
    row = await _measure_floor(floor, exchange, tokens, arguments.seconds)
    yield row
    calls = max(5, min(1000, row.calls))
    for what, measure in (
        ("raw socket", lambda: raw_socket_seconds(echo.raw, exchange, calls)),
        ("memcpy", lambda: memcpy_seconds(exchange, calls)),
    ):
        seconds = await asyncio.to_thread(measure)
        yield _summary(what, tokens, 1, seconds, sum(seconds), exchange.total_bytes, {})
    for transport, moe in moes.items():
        for callers in arguments.callers:
            hidden = torch.randn(tokens, moe.model.hidden_size, device="cuda" if transport == "cuda" else "cpu")
            yield await _measure_server(moe, f"expertd {transport}", exchange, hidden, callers, arguments.seconds)


async def _connect(
    stack: contextlib.AsyncExitStack, arguments: argparse.Namespace, config: CoordinatorConfig
) -> dict[str, Coordinator]:
    """A coordinator for each transport. Raises `BenchError` for one that cannot be had."""
    addresses = {}
    if arguments.servers is not None:
        addresses = dict.fromkeys(("grpc", "shm", "cuda"), arguments.servers)
    else:
        unix = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertd-"))) / "socket"
        cluster = await stack.enter_async_context(_own_server(arguments, unix))
        addresses = dict.fromkeys(TRANSPORTS, cluster.addresses) | {"unix": [f"unix:{unix}"]}
    moes = {}
    for transport in arguments.transport or addresses:
        if transport not in addresses:
            raise BenchError("--transport unix is of its own server; give --servers unix:PATH with --transport grpc")
        chosen = config if transport in ("shm", "cuda") else replace(config, shared_memory_bytes=0)
        moe = await stack.enter_async_context(Coordinator(addresses[transport], chosen))
        obstacle = await _obstacle(moe, transport, len(addresses[transport]))
        if obstacle is None:
            moes[transport] = moe
        elif arguments.transport is not None:
            raise BenchError(f"--transport {transport}: {obstacle}")
    return moes


async def _obstacle(moe: Coordinator, transport: str, servers: int) -> str | None:
    """Why a transport cannot be measured."""
    if transport == "shm" and len(moe.sharing_memory) < servers:
        return "a server shares no memory with this process; see the log for why"
    if transport == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU here"
    if transport == "cuda":
        # One token for every expert, so that every server is called.
        experts = torch.arange(moe.model.n_routed_experts).unsqueeze(1)
        hidden = torch.zeros(len(experts), moe.model.hidden_size, device="cuda")
        await moe(moe.layers[0], hidden, topk_ids=experts, topk_weights=torch.ones(experts.shape))
        if len(moe.sharing_gpu_memory) < servers:
            return "a server shares no memory of this process's GPU; see the log for why"
    return None


def _own_server(arguments: argparse.Namespace, unix: Path) -> LocalCluster:
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
    threads = str(max(1, (os.cpu_count() or 2) - 1))
    options = ["--backend", arguments.backend, "--threads", threads, "--unix-socket", str(unix)]
    return LocalCluster(folder, [f"0-{LOCAL_EXPERTS - 1}"], options)


def _exchange(config: CoordinatorConfig, hidden_size: int, tokens: int) -> Exchange:
    """The bytes of a call with one expert a token, cut like the coordinator cuts them."""
    chunk = min(tokens, config.chunk_tokens(hidden_size, config.chunk_bytes))
    scales = hidden_size // 128 * 4 if config.hidden_dtype == torch.float8_e4m3fn else 0
    up = hidden_size * config.hidden_dtype.itemsize + scales + 8
    return Exchange(up * chunk, hidden_size * config.reply_dtype.itemsize * chunk, -(-tokens // chunk))


async def _measure_floor(floor: GrpcFloor, exchange: Exchange, tokens: int, seconds: float) -> Measurement:
    times, wall = await _repeat(lambda: floor.exchange(exchange), 1, seconds)
    return _summary("grpc echo", tokens, 1, times, wall, exchange.total_bytes, {})


async def _measure_server(
    moe: Coordinator, what: str, exchange: Exchange, hidden: Tensor, callers: int, seconds: float
) -> Measurement:
    hidden, tokens = hidden.bfloat16(), len(hidden)
    experts = moe.model.n_routed_experts
    ids, weights = torch.randint(experts, (tokens, 1)), torch.rand(tokens, 1)
    timings: list[StageTimings] = []

    async def call() -> None:
        result = await moe.execute(moe.layers[0], hidden, topk_ids=ids, topk_weights=weights)
        if result.output.is_cuda:
            torch.cuda.synchronize()
        timings.append(result.servers[0].timings)

    await call()
    timings.clear()
    times, wall = await _repeat(call, callers, seconds)
    stages = {stage: statistics.median(getattr(timing, stage) for timing in timings) for stage in STAGES}
    return _summary(what, tokens, callers, times, wall, exchange.total_bytes, stages)


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
    sizes = f"{config.chunk_bytes} bytes, {config.shared_memory_chunk_bytes} in shared memory"
    return f"{config.channels} channels, messages of at most {sizes}"
