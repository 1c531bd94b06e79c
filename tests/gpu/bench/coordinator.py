"""What calls of a coordinator cost, awaited and from a thread, through shared memory and over gRPC.

    python -m tests.gpu.bench.coordinator [--backend cutile] [--seconds 1.5] [--tokens 1 64 1024 16384]

prints medians; those of gRPC beside an echo of the same bytes, one of each in turn. With --processes N: the tokens a
second of so many callers at once, each a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Mapping

import torch
import uvloop
from torch import Tensor

from expertd.client.call.result import MoeResult
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.sync import SyncCoordinator
from expertd.client.tools.bench.calls import Floors
from expertd.client.tools.bench.floors import GrpcFloor, running_echo
from expertd.client.tools.bench.servers import LOCAL_EXPERTS, bench_model
from expertd.client.tools.bench.timing import in_turn, in_turn_here
from expertd.client.tools.cluster import LocalCluster
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.kernels.numerics.quantize import FP8
from expertd.kernels.weights.files import cache_folder
from expertd.proto.base.malloc import keep_freed_memory
from tests.gpu.bench.callers import at_once, until_all_are_ready

HIDDEN_SIZE, INTERMEDIATE_SIZE = 7168, 2048
WAYS = {
    "shared memory": CoordinatorConfig(),
    "shared memory, results shared": CoordinatorConfig(shared_results=True),
    "grpc": CoordinatorConfig(shared_memory_bytes=0),
    "shared memory, FP8 back": CoordinatorConfig(reply_dtype=FP8),
    "grpc, FP8 back": CoordinatorConfig(shared_memory_bytes=0, reply_dtype=FP8),
    "shared memory, BF16 sent": CoordinatorConfig(hidden_dtype=torch.bfloat16),
}
USUAL = list(WAYS)[:3]
CALL, ECHO = "call", "echo"


def arguments_of(tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """BF16 hidden states in host memory, every token for one expert, as of a server among eight."""
    choice = {"topk_ids": torch.randint(LOCAL_EXPERTS, (tokens, 1)), "topk_weights": torch.rand(tokens, 1)}
    return torch.randn(tokens, HIDDEN_SIZE).bfloat16(), choice


def show(way: str, tokens: int, times: Mapping[str, list[float]], result: MoeResult) -> None:
    medians = {name: 1e6 * statistics.median(seconds) for name, seconds in times.items()}
    stages = " ".join(f"{name} {1e6 * spent:.0f}" for name, spent in result.servers[0].timings._asdict().items())
    echo = ""
    if ECHO in medians:
        above, ratio = medians[CALL] - medians[ECHO], medians[CALL] / medians[ECHO]
        echo = f"echo {medians[ECHO]:.0f}, above it {above:.0f}, {ratio:.2f}x;"
    print(
        f"{way:30} {tokens:6} tokens {medians[CALL]:10.1f} us, {len(times[CALL]):6} calls; {echo} {stages}", flush=True
    )


async def awaited(way: str, address: str, floors: Floors, tokens: int) -> None:
    async with Coordinator([address], WAYS[way]) as moe:
        hidden, choice = arguments_of(tokens)
        last: list[MoeResult] = []

        async def call() -> None:
            last[:] = [await moe.execute(moe.layers[0], hidden, **choice)]

        calls = {CALL: call}
        if way.startswith("grpc"):
            exchange = floors.exchange(HIDDEN_SIZE, tokens)
            calls[ECHO] = lambda: floors.grpc.exchange(exchange)
        show(f"{way}, awaited", tokens, await in_turn(calls, floors.seconds), last[0])


def from_a_thread(way: str, address: str, seconds: float, tokens: int) -> None:
    with SyncCoordinator([address], WAYS[way]) as moe:
        hidden, choice = arguments_of(tokens)
        last: list[MoeResult] = []

        def call() -> None:
            last[:] = [moe.execute(moe.layers[0], hidden, **choice)]

        show(f"{way}, from a thread", tokens, in_turn_here({CALL: call}, seconds), last[0])


async def worker(way: str, address: str, seconds: float, tokens: int) -> None:
    """One of several callers: waits for a line, calls for `seconds`, and prints its tokens a second."""
    async with Coordinator([address], WAYS[way]) as moe:
        hidden, choice = arguments_of(tokens)
        for _ in range(3):
            await moe.execute(moe.layers[0], hidden, **choice)
        await until_all_are_ready()
        started, calls = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            await moe.execute(moe.layers[0], hidden, **choice)
            calls += 1
        print(tokens * calls / (time.perf_counter() - started), flush=True)


async def together(way: str, address: str, processes: int, seconds: float, tokens: int) -> float:
    """Tokens a second of so many callers at once."""
    workers = [(way, address, seconds, tokens)] * processes
    return sum(map(float, await at_once("tests.gpu.bench.coordinator", workers)))


async def main(arguments: argparse.Namespace) -> None:
    folder = write_demo_checkpoint(cache_folder() / "bench", bench_model(HIDDEN_SIZE, INTERMEDIATE_SIZE))
    options = ["--backend", arguments.backend, "--shared-memory-bytes", str(16 << 30), *arguments.options.split()]
    if arguments.processes:
        async with LocalCluster(folder, [f"0-{LOCAL_EXPERTS - 1}"], options) as cluster:
            for way in arguments.ways:
                for tokens in arguments.tokens:
                    rate = await together(way, cluster.addresses[0], arguments.processes, arguments.seconds, tokens)
                    print(
                        f"{way:30} {tokens:6} tokens, {arguments.processes} processes: {rate:10.0f} tokens/s",
                        flush=True,
                    )
        return
    async with running_echo() as echo, LocalCluster(folder, [f"0-{LOCAL_EXPERTS - 1}"], options) as cluster:
        (address,) = cluster.addresses
        config = WAYS["grpc"]
        floor = GrpcFloor(echo.grpc, config.channels)
        floors = Floors(echo, floor, config, arguments.seconds)
        for way in arguments.ways:
            for tokens in arguments.tokens:
                await awaited(way, address, floors, tokens)
                await asyncio.to_thread(from_a_thread, way, address, arguments.seconds, tokens)
        await floor.close()


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--worker"]:
        uvloop.run(worker(sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5])))
        sys.exit()
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="cutile")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--ways", nargs="+", default=USUAL, choices=WAYS)
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 64, 1024, 16384))
    parser.add_argument("--processes", type=int, default=0, help="callers at once")
    parser.add_argument("--options", default="", help="more of the server's")
    uvloop.run(main(parser.parse_args()))
