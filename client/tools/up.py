"""`expertd up`: a whole model served from this machine, by as many servers as it has GPUs, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from expertd._native import usable_cpus
from expertd.client.tools.cluster import Each, LocalCluster, ServerDied, tail_of
from expertd.kernels.model.config import InvalidConfig, MoeConfig
from expertd.kernels.model.ranges import format_ranges, shard_of

LOOK_SECONDS = 1.0
"""Between two looks at how far loading is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="folder of the checkpoint")
    parser.add_argument(
        "--servers",
        type=int,
        metavar="N",
        help="server processes, which share the GPUs (default: one for each GPU; without any, one)",
    )
    parser.add_argument(
        "--port", type=int, default=50051, help="of the first server, others follow; 0: free ones (default: 50051)"
    )
    parser.add_argument("options", nargs="*", metavar="OPTION", help="after --: options of 'expertd serve' for all")


def run(arguments: argparse.Namespace) -> int:
    """0 after Ctrl-C or SIGTERM when all servers drained, 1 when one did not start or ended, 2 for wrong options."""
    try:
        experts = MoeConfig.from_json(arguments.model / "config.json").n_routed_experts
        gpus = torch.cuda.device_count()
        servers = (gpus or 1) if arguments.servers is None else arguments.servers
        if not 1 <= servers <= experts:
            raise ValueError(f"--servers is {servers}; it must be from 1 to the model's {experts} experts")
        if not 0 <= arguments.port <= 65536 - servers:
            raise ValueError(f"--port is {arguments.port}; it must be from 0 to {65536 - servers}")
    except (InvalidConfig, ValueError) as error:
        print(f"expertd up: error: {error}", file=sys.stderr)
        return 2
    cluster = _cluster(arguments.model, experts, servers, gpus, arguments.port, arguments.options)
    console = Console(highlight=False, soft_wrap=True)
    # Shells have what scripts start in the background ignore SIGINT, with which SIGTERM would be ignored, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with asyncio.Runner() as runner:
            # Like Ctrl-C, so that the servers are stopped before this process ends.
            runner.get_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
            return runner.run(_serve(cluster, console))
    except KeyboardInterrupt:
        drained = not any(cluster.exit_codes)
        console.print("all servers drained and stopped" if drained else f"exit codes {cluster.exit_codes}")
        return 0 if drained else 1
    except ServerDied as error:
        print(f"expertd up: error: {error}", file=sys.stderr)
        return 1


def _cluster(model: Path, experts: int, servers: int, gpus: int, port: int, options: Sequence[str]) -> LocalCluster:
    def each(index: int) -> Each:
        listen = ("--listen", f"127.0.0.1:{port + index}") if port else ()
        own = gpus_of(index, servers, gpus)
        devices = ("--devices", "all") if len(own) > 1 else ()
        return Each((*listen, *devices), {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own))} if own else {})

    shards = [format_ranges(shard_of(experts, index + 1, servers)) for index in range(servers)]
    # They start at once, before they can see each other. What is given wins: it comes later.
    threads = ("--threads", str(max(1, usable_cpus() // servers)))
    return LocalCluster(model, shards, [*threads, *options], start_timeout=math.inf, each=each)


def gpus_of(index: int, servers: int, gpus: int) -> range | tuple[int, ...]:
    """A server's among all: as many as each other one's, or one that others have too where there are too few."""
    if not gpus:
        return ()
    each = max(1, gpus // servers)
    first = index * each % gpus
    return range(first, first + each)


async def _serve(cluster: LocalCluster, console: Console) -> int:
    started = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        async with _progress(cluster, console):
            await stack.enter_async_context(cluster)
        console.print(f"serving after {time.monotonic() - started:.0f} s, until Ctrl-C:")
        for server in cluster.servers:
            console.print(f"  {server.address}  metrics {server.metrics_url}  log {server.log}")
        console.print(f"\n{snippet(cluster.addresses)}\n")
        ended = await cluster.until_one_ends()
        raise ServerDied(f"{ended.address} ended with exit code {ended.process.returncode}\n{tail_of(ended.log)}")


@contextlib.asynccontextmanager
async def _progress(cluster: LocalCluster, console: Console) -> AsyncIterator[None]:
    """Show what servers say of their start: in place on a terminal, elsewhere a line for all that is new."""
    with console.status("starting") as status:

        async def show() -> None:
            shown: list[str] = []
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                lines = [f"server {index}: {line}" for index, line in enumerate(cluster.progress())]
                status.update("\n".join(lines))
                if not console.is_terminal:
                    for line in set(lines) - set(shown):
                        console.print(line)
                shown = lines

        showing = asyncio.create_task(show())
        try:
            yield
        finally:
            showing.cancel()


def snippet(addresses: Sequence[str]) -> str:
    """Python that calls the servers."""
    return (
        "from expertd import SyncCoordinator\n\n"
        f"with SyncCoordinator({list(addresses)}) as moe:\n"
        "    y = moe(layer, hidden, topk_ids=ids, topk_weights=weights)"
    )
