"""What calls of a whole server cost, straight through a transport: server and callers are processes of their own.

    python -m tests.gpu.bench.serving [FILE] [--backend cutile] [--seconds 3]

prints a table, and writes it to FILE as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import uvloop

from expertd.client.base.quantiles import p50_p99
from expertd.client.tools.bench.floors import Exchange, GrpcFloor, running_echo
from expertd.client.tools.bench.servers import LOCAL_EXPERTS, bench_model
from expertd.client.tools.bench.timing import in_turn
from expertd.client.tools.cluster import LocalCluster
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.kernels.numerics.quantize import quantize_activations
from expertd.kernels.weights.files import cache_folder
from expertd.proto.base.malloc import keep_freed_memory
from expertd.proto.codec import ExecuteCall, ShardInfo
from tests.gpu.bench.callers import at_once, until_all_are_ready

STAGES = ("decode", "queue", "copy_in", "compute", "copy_out")


@dataclass(frozen=True)
class Row:
    """Microseconds."""

    what: str
    tokens: int
    calls: int
    p50: float
    p99: float
    per_second: float
    """Tokens of all callers."""
    stages: dict[str, float]


def call_of(shard: ShardInfo, tokens: int, wanted: bool) -> ExecuteCall:
    """Every token for one expert, as of a server among eight; or for none."""
    hidden, scales = quantize_activations(torch.randn(tokens, int(shard.config["hidden_size"])))  # type: ignore[arg-type]
    ids = torch.randint(len(shard.experts[shard.layers[0]]), (tokens, 1), dtype=torch.int32)
    return ExecuteCall(
        request_id=1,
        model_fingerprint=shard.model_fingerprint,
        placement_epoch=shard.placement_epoch,
        layer=shard.layers[0],
        hidden=hidden,
        scales=scales,
        expert_ids=ids if wanted else ids.fill_(-1),
        weights=torch.rand(tokens, 1),
        reply_dtype=torch.bfloat16,
    )


class Calls:
    """Times calls, and keeps what the server says of them."""

    def __init__(self, what: str, tokens: int) -> None:
        self._what, self._tokens = what, tokens
        self.seconds: list[float] = []
        self.stages: list[tuple[float, ...]] = []

    def row(self, wall: float) -> Row:
        p50, p99 = p50_p99(self.seconds)
        stages = (
            {name: 1e6 * statistics.median(one[index] for one in self.stages) for index, name in enumerate(STAGES)}
            if self.stages
            else {}
        )
        count = len(self.seconds)
        return Row(self._what, self._tokens, count, 1e6 * p50, 1e6 * p99, self._tokens * count / wall, stages)


async def repeat(calls: Calls, one: Callable[[], object], seconds: float, gap: float = 0.0) -> Row:
    """`one` makes a call on this thread, or what is awaited for it."""

    async def call() -> object:
        made = one()
        return await made if inspect.isawaitable(made) else made

    started, warm = time.perf_counter(), 0
    while warm < 20 and time.perf_counter() - started < seconds:
        await call()
        warm += 1
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(calls.seconds) < 5:
        begun = time.perf_counter()
        result = await call()
        calls.seconds.append(time.perf_counter() - begun)
        calls.stages.append(tuple(getattr(result, "timings", ())) or (0.0,) * 5)
        if gap:
            time.sleep(gap)
    return calls.row(time.perf_counter() - started)


async def transport_of(address: str, kind: str) -> tuple[GrpcTransport | SharedMemoryTransport, ShardInfo]:
    grpc = GrpcTransport(address)
    transport = SharedMemoryTransport(grpc, 2 << 30) if kind == "shm" else grpc
    return transport, await transport.get_shard(30.0)


async def worker(address: str, kind: str, tokens: int, callers: int, seconds: float) -> None:
    """Waits for a line, then calls for `seconds`; "shm parts" from a thread, which cuts large calls."""
    kind, _, in_parts = kind.partition(" ")
    transport, shard = await transport_of(address, kind)
    calls = Calls(f"{kind}{' in parts' * bool(in_parts)}, {callers} callers", tokens)
    own = [replace(call_of(shard, tokens, True), request_id=number + 1) for number in range(callers)]

    async def execute(call: ExecuteCall) -> None:
        if in_parts and isinstance(transport, SharedMemoryTransport):
            await asyncio.to_thread(transport.call, call)
        else:
            await transport.execute(call)

    for call in own:
        await transport.execute(call)
        await execute(call)
    await until_all_are_ready()
    started = time.perf_counter()

    async def caller(call: ExecuteCall) -> None:
        while time.perf_counter() - started < seconds:
            begun = time.perf_counter()
            await execute(call)
            calls.seconds.append(time.perf_counter() - begun)

    await asyncio.gather(*map(caller, own))
    print(json.dumps(asdict(calls.row(time.perf_counter() - started))), flush=True)
    await transport.close()


async def together(address: str, workers: list[tuple[str, int, int]], seconds: float) -> list[Row]:
    """Caller processes (transport, tokens, callers), at once."""
    lines = await at_once("tests.gpu.bench.serving", [(address, *worker, seconds) for worker in workers])
    return [Row(**json.loads(line)) for line in lines]


async def measure(
    address: str, floor: GrpcFloor, seconds: float, largest: int, *, over_grpc: bool, wanted_only: bool
) -> AsyncIterator[Row]:
    shm, shard = await transport_of(address, "shm")
    assert isinstance(shm, SharedMemoryTransport)
    grpc, _ = await transport_of(address, "grpc")
    width = int(shard.config["hidden_size"])  # type: ignore[arg-type]
    for wanted in (True,) if wanted_only else (True, False):
        note = "" if wanted else ", no experts"
        for tokens in (1, 64, largest):
            call = call_of(shard, tokens, wanted)
            # Until so much memory is shared that sums stay in it while their caller has those of the call before.
            held = [await shm.execute(call) for _ in range(3)]
            del held
            yield await repeat(Calls(f"shm{note}", tokens), lambda: shm.execute(call), seconds)  # noqa: B023
            yield await repeat(Calls(f"shm thread{note}", tokens), lambda: shm.call(call), seconds)  # noqa: B023
            if tokens == 1:
                yield await repeat(
                    Calls(f"shm thread, 1 ms apart{note}", tokens),
                    lambda: shm.call(call),  # noqa: B023
                    seconds,
                    1e-3,
                )
                yield await repeat(Calls(f"shm, 1 ms apart{note}", tokens), lambda: shm.execute(call), seconds, 1e-3)  # noqa: B023
            if wanted and over_grpc:
                exchange = Exchange(
                    len(call.hidden.view(-1)) + 4 * tokens * (width // 128) + 8 * tokens, 2 * width * tokens
                )
                stages: list[tuple[float, ...]] = []

                async def call_grpc() -> None:
                    stages.append((await grpc.execute(call)).timings)  # noqa: B023

                ways = {"grpc echo": lambda: floor.exchange(exchange), "grpc": call_grpc}  # noqa: B023
                for way, times in (await in_turn(ways, seconds)).items():
                    calls = Calls(way, tokens)
                    calls.seconds, calls.stages = times, stages if way == "grpc" else []
                    yield calls.row(sum(times))
    await shm.close()
    await grpc.close()


async def main(arguments: argparse.Namespace) -> None:
    folder = write_demo_checkpoint(
        cache_folder() / "bench", bench_model(arguments.hidden_size, arguments.intermediate_size)
    )
    serving = ["--backend", arguments.backend, "--shared-memory-bytes", str(16 << 30), *arguments.options.split()]
    serving += ["--max-tokens-per-request", str(arguments.largest), "--max-batch-tokens", str(arguments.largest)]
    rows = []
    async with contextlib.AsyncExitStack() as stack:
        echo = await stack.enter_async_context(running_echo())
        cluster = await stack.enter_async_context(LocalCluster(folder, [f"0-{LOCAL_EXPERTS - 1}"], serving))
        (address,) = cluster.addresses
        floor = GrpcFloor(echo.grpc, 1)
        stack.push_async_callback(floor.close)

        def show(row: Row) -> None:
            rows.append(row)
            stages = " ".join(f"{name} {spent:.0f}" for name, spent in row.stages.items())
            print(
                f"{row.what:38} {row.tokens:6} tokens {row.p50:10.1f} us, p99 {row.p99:10.1f}, "
                f"{row.calls:7} calls, {row.per_second:10.0f} tokens/s  {stages}",
                flush=True,
            )

        if not arguments.only_together:
            over_grpc = "grpc" in arguments.transports
            options = {"over_grpc": over_grpc, "wanted_only": arguments.wanted_only}
            async for row in measure(address, floor, arguments.seconds, arguments.largest, **options):
                show(row)
        for kind in arguments.transports:
            for row in await together(address, [(kind, 4, 16)] * 4, arguments.seconds):
                show(row)
            for beside in (kind, "shm parts") if kind == "shm" else (kind,):
                for row in await together(address, [(kind, 1, 1), (beside, arguments.largest, 1)], arguments.seconds):
                    show(row)
            for row in await together(address, [(kind, 4096, 1)] * 4, arguments.seconds) if arguments.batches else ():
                show(row)
    if cluster.exit_codes != [0]:
        print(cluster.exit_codes, cluster.servers[0].log.read_text()[-3000:])
    if arguments.file:
        arguments.file.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    keep_freed_memory()
    if sys.argv[1:2] == ["--worker"]:
        torch.set_num_threads(1)
        address, kind, tokens, callers, seconds = sys.argv[2:]
        uvloop.run(worker(address, kind, int(tokens), int(callers), float(seconds)))
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("file", type=Path, nargs="?")
        parser.add_argument("--backend", default="cutile")
        parser.add_argument("--seconds", type=float, default=3.0)
        parser.add_argument("--largest", type=int, default=16384)
        parser.add_argument("--hidden-size", type=int, default=7168)
        parser.add_argument("--intermediate-size", type=int, default=2048)
        parser.add_argument("--options", default="", help="more of the server's")
        parser.add_argument("--transports", nargs="+", default=("shm", "grpc"))
        parser.add_argument("--batches", action="store_true", help="four callers of 4096 tokens at once, too")
        parser.add_argument("--wanted-only", action="store_true", help="no calls that want no expert")
        parser.add_argument("--only-together", action="store_true", help="many callers at once, and nothing else")
        torch.set_num_threads(1)
        uvloop.run(main(parser.parse_args()))
