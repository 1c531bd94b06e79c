"""`expertd bench serve`: latency and throughput of a server, beside what the same bytes cost without it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial

import torch
import uvloop
from rich.console import Console
from rich.progress import Progress

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.fleet.ports import explained
from expertd.client.tools.bench import fan_out, layers, micro_batches
from expertd.client.tools.bench.calls import Floors, measure_calls
from expertd.client.tools.bench.floors import GrpcFloor, running_echo
from expertd.client.tools.bench.options import BATCHES, CALLERS, TOKENS, BenchError, add_arguments, check, sections_of
from expertd.client.tools.bench.picture import draw_calls, draw_sections
from expertd.client.tools.bench.report import Comparison, Measurement, Section, print_calls, print_section
from expertd.client.tools.bench.servers import Way, addresses_of, connect
from expertd.client.tools.cluster import ServerDied
from expertd.client.transport.security import ClientSecurity, security_from
from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.weights.checkpoint import CheckpointError
from expertd.proto.base.errors import ExpertdError
from expertd.proto.base.malloc import keep_freed_memory

__all__ = ["add_arguments", "run"]
Measure = Callable[[Way], Awaitable[list[Comparison]]]


def run(arguments: argparse.Namespace) -> int:
    """0, 2 for what cannot be measured, 130 after Ctrl-C; tables go to standard output, progress to standard error."""
    try:
        check(arguments)
        security = security_from(arguments)
        keep_freed_memory()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            # Like Ctrl-C, so that its own servers are stopped before this process ends.
            runner.get_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
            runner.run(_bench(arguments, security))
    except KeyboardInterrupt:
        print("expertd bench serve: interrupted; its own servers are stopped", file=sys.stderr)
        return 130
    except ExpertdError as error:
        print(f"expertd bench serve: error: {explained(error, security)}", file=sys.stderr)
        return 2
    except (BenchError, CheckpointError, InvalidConfig, ServerDied, ValueError) as error:
        print(f"expertd bench serve: error: {error}", file=sys.stderr)
        return 2
    return 0


async def _bench(arguments: argparse.Namespace, security: ClientSecurity) -> None:
    config = CoordinatorConfig(
        security=security,
        channels=arguments.channels,
        chunk_bytes=arguments.chunk_bytes,
        shared_memory_chunk_bytes=arguments.shared_memory_chunk_bytes,
    )
    async with contextlib.AsyncExitStack() as stack:
        # Processes first: gRPC does not like forks once it runs.
        with Console(stderr=True).status("starting a server" if arguments.servers is None else "asking servers"):
            addresses = await addresses_of(stack, arguments)
        echo = await stack.enter_async_context(running_echo())
        with Console(stderr=True).status("connecting"):
            ways = await connect(stack, addresses, arguments.transport, config, max(arguments.tokens or TOKENS))
        floor = GrpcFloor(echo.grpc, config.channels)
        stack.push_async_callback(floor.close)
        floors = Floors(echo, floor, config, arguments.seconds)
        progress = stack.enter_context(Progress(console=Console(file=sys.stderr), disable=not sys.stderr.isatty()))
        if sections_of(arguments):
            rows, sections = [], await _measure_sections(arguments, ways, floors, progress)
        else:
            rows, sections = await _measure_calls(arguments, ways, floors, progress), []
    _write(arguments, rows, sections, _title(config))


async def _measure_calls(
    arguments: argparse.Namespace, ways: Sequence[Way], floors: Floors, progress: Progress
) -> list[Measurement]:
    sizes = arguments.tokens or TOKENS
    callers = () if arguments.no_experts else arguments.callers or CALLERS
    shared = any(way.transport == "shm" for way in ways)
    each = sum(2 if way.transport == "stream" else len(callers) for way in ways) if callers else len(ways) + 2 * shared
    task = progress.add_task("measuring", total=len(sizes) * (3 + each))
    rows = []
    for tokens in sizes:
        async for row in measure_calls(floors, ways, tokens, callers):
            rows.append(row)
            progress.advance(task)
    return rows


async def _measure_sections(
    arguments: argparse.Namespace, ways: Sequence[Way], floors: Floors, progress: Progress
) -> list[Section]:
    wanted = _sections(arguments, floors)
    task = progress.add_task("measuring", total=len(wanted) * len(ways))
    sections = []
    for name, compared_with, measure in wanted:
        rows = []
        for way in ways:
            rows += await measure(way)
            progress.advance(task)
        sections.append(Section(name, compared_with, rows))
    return sections


def _sections(arguments: argparse.Namespace, floors: Floors) -> list[tuple[str, str, Measure]]:
    """Names of what was asked for, what ratios are of, and what measures one way."""
    seconds = arguments.seconds
    sections: list[tuple[str, str, Measure]] = []
    if arguments.servers_of_its_own is not None:
        sections.append(("fan-out", fan_out.COMPARED_WITH, partial(fan_out.measure_fan_out, seconds=seconds)))
    if arguments.layers:
        sections.append(("layers", layers.COMPARED_WITH, partial(layers.measure_layers, floors=floors)))
    if arguments.micro_batches:
        measure = partial(
            micro_batches.measure_micro_batches,
            sizes=arguments.tokens or BATCHES,
            caller_seconds=None if arguments.caller_ms is None else arguments.caller_ms / 1e3,
            seconds=seconds,
        )
        sections.append(("micro-batches", micro_batches.COMPARED_WITH, measure))
    return sections


def _write(arguments: argparse.Namespace, rows: Sequence[Measurement], sections: Sequence[Section], title: str) -> None:
    """Everything that was found, wherever it was asked for."""
    if rows:
        print_calls(rows, title)
    for section in sections:
        print_section(section)
    if arguments.json is not None:
        machine = {"cores": os.cpu_count(), "machine": platform.platform(), "torch": torch.__version__}
        found = {"rows": [asdict(row) for row in rows], "sections": [asdict(section) for section in sections]}
        arguments.json.write_text(json.dumps({"machine": machine, **found}, indent=2))
    if arguments.plot is not None and rows:
        draw_calls(rows, title, arguments.plot)
    if arguments.plot is not None and sections:
        draw_sections(sections, title, arguments.plot)


def _title(config: CoordinatorConfig) -> str:
    sizes = f"{config.chunk_bytes} bytes, {config.shared_memory_chunk_bytes} in shared memory"
    return f"{config.channels} channels, messages of at most {sizes}"
