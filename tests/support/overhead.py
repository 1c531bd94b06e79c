"""What recording and checking cost a call of one token: calls with and without them, in turns, in one run.

    python -m tests.support.overhead

prints medians by transport. The server is this process, the caller another one. Left out in every other turn are the
journal and the metrics, the checks of requests and of computed pairs, and the checksums of both ends; no option of a
server leaves them out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import uvloop

from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.interface import Transport
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.kernels.numerics.backend import Partials, TokenBatch, Underway
from expertd.proto.codec import ExecuteCall, request, response
from expertd.server.app import Server
from expertd.server.scheduling import batching as scheduler
from expertd.server.scheduling.device import BatchOutcome
from expertd.server.scheduling.shard import Shard
from tests.support.families import SMALL
from tests.support.serving import call_for, random_batch, running_server

TURNS, CALLS = 60, 50
"""Of each kind, and calls a turn."""


def nothing(*arguments: object) -> None:
    pass


def no_checksum(*arguments: object) -> bytes:
    # No mock: its calls cost more than what is left out.
    return bytes(4)


@contextlib.contextmanager
def no_request(*arguments: object) -> Iterator[None]:
    yield


def admit_unchecked(shard: Shard, call: ExecuteCall) -> TokenBatch:
    local = shard._local_ids[call.expert_ids.numpy() + 1]
    return TokenBatch(call.hidden, call.scales, torch.from_numpy(local), call.weights, call.reply_into)


def collect_unchecked(layer: int, requests: Sequence[TokenBatch], count: int, underway: Underway) -> BatchOutcome:
    computed = underway.result()
    pairs = torch.from_numpy(np.bincount(requests[0].expert_ids.numpy().ravel() + 1, minlength=count + 1)[1:])
    return BatchOutcome((Partials(computed.sums[0], pairs),), computed.seconds)


class Unrecorded:
    """Series that nobody counts."""

    def labels(self, *values: object) -> Unrecorded:
        return self

    inc = observe = staticmethod(nothing)
    queue_wait = batch_tokens = device_busy = property(lambda self: self)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    with (
        mock.patch.object(request, "_check_range", nothing),
        mock.patch.object(response, "_checksum", no_checksum),
    ):
        yield


@contextlib.contextmanager
def bare(server: Server) -> Iterator[None]:
    """A server without recording and checking, as far as these can be told from the work itself."""
    with (
        unchecked(),
        mock.patch.object(server.journal, "request", no_request),
        mock.patch.object(server.journal, "answered", nothing),
        mock.patch.object(server.scheduler, "_metrics", Unrecorded()),
        mock.patch.object(server.scheduler, "check_room", nothing),
        mock.patch.object(Shard, "admit", admit_unchecked),
        mock.patch.object(scheduler, "collect", collect_unchecked),
    ):
        yield


async def call_in_turns(address: str, name: str) -> None:
    """The caller: a line of standard input is a turn, and whether it is a bare one."""
    grpc = GrpcTransport(address)
    transport: Transport = grpc if name == "stream" else SharedMemoryTransport(grpc, 1 << 24)
    shard = await transport.get_shard(10.0)
    call = call_for(shard, random_batch(1, SMALL.hidden_size, SMALL.n_routed_experts, SMALL.num_experts_per_tok))
    for line in sys.stdin:
        seconds = []
        with unchecked() if json.loads(line) else contextlib.nullcontext():
            for _ in range(CALLS):
                started = time.perf_counter()
                await transport.execute(call)
                seconds.append(time.perf_counter() - started)
        print(json.dumps(seconds), flush=True)
    await transport.close()


async def compare(server: Server, name: str) -> None:
    caller = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.overhead", str(server.address), name),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    turns, answers = caller.stdin, caller.stdout
    assert turns is not None
    assert answers is not None

    async def turn(is_bare: bool) -> list[float]:
        turns.write(b"true\n" if is_bare else b"false\n")
        with bare(server) if is_bare else contextlib.nullcontext():
            seconds: list[float] = json.loads(await answers.readline())
        return seconds

    whole: list[float] = []
    without: list[float] = []
    await turn(False)
    for _ in range(TURNS):
        whole += await turn(False)
        without += await turn(True)
    turns.close()
    await caller.wait()
    one, other = statistics.median(whole) * 1e6, statistics.median(without) * 1e6
    print(f"{name}: {one:.0f} us, {other:.0f} us without: {one - other:.0f} us, {(one - other) / one:.1%}")


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with running_server(write_demo_checkpoint(Path(folder), SMALL), range(16)) as server:
            for _ in range(2):
                await compare(server, "stream")
                await compare(server, "shared memory")


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvloop.run(call_in_turns(*sys.argv[1:]) if sys.argv[1:] else main())
