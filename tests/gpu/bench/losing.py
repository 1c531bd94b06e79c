"""What 64 callers lose while one of the replicas that they call is away: killed, and not started again.

    python -m tests.gpu.bench.losing [--backend cutile] [--replicas 2] [--tokens 4 64]

Each replica has a GPU of its own, as far as there are. Prints tokens a second before the kill and from its moment on,
what is lost beyond the replica's share of the fleet, and calls that failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from subprocess import PIPE

import torch
import uvloop

from expertd.client.coordinator import Coordinator
from expertd.client.tools.bench.servers import LOCAL_EXPERTS, bench_model
from expertd.client.tools.cluster import Each, LocalCluster
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.kernels.weights.files import cache_folder
from expertd.proto.base.errors import ExpertdError
from expertd.proto.base.malloc import keep_freed_memory

PROCESSES, CALLERS = 4, 16
WARM = 4.0
"""Seconds of calls before any count."""
BUCKET = 0.1
"""Seconds of monotonic time, in which calls are counted."""


async def worker(tokens: int, seconds: float, addresses: Sequence[str]) -> None:
    """A process of callers; prints how many calls ended in each bucket, and the errors."""
    ended: Counter[int] = Counter()
    errors: list[str] = []
    async with Coordinator(addresses) as moe:
        width = moe.model.hidden_size
        print("ready", flush=True)
        until = time.monotonic() + seconds

        async def caller() -> None:
            hidden = torch.randn(tokens, width).bfloat16()
            choice = {"topk_ids": torch.randint(LOCAL_EXPERTS, (tokens, 1)), "topk_weights": torch.rand(tokens, 1)}
            while time.monotonic() < until:
                try:
                    await moe.execute(moe.layers[0], hidden, **choice)
                    ended[int(time.monotonic() / BUCKET)] += 1
                except ExpertdError as error:
                    errors.append(str(error))

        await asyncio.gather(*(caller() for _ in range(CALLERS)))
    print(json.dumps([ended, errors]), flush=True)


async def lose(cluster: LocalCluster, tokens: int, seconds: float) -> None:
    replicas = len(cluster.servers)
    command = [sys.executable, "-m", "tests.gpu.bench.losing", "--worker", str(tokens), str(WARM + 2 * seconds)]
    processes = [
        await asyncio.create_subprocess_exec(*command, *cluster.addresses, stdout=PIPE) for _ in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        await process.stdout.readline()
    await asyncio.sleep(WARM + seconds)
    victim = cluster.servers[0].process
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.monotonic()
    total: Counter[int] = Counter()
    failed: list[str] = []
    for process in processes:
        assert process.stdout is not None
        ended, errors = json.loads(await process.stdout.read())
        total.update({int(bucket): count for bucket, count in ended.items()})
        failed += errors
    moment = int(killed / BUCKET)
    count = int((seconds - 1) / BUCKET)  # callers began up to a second apart
    before = tokens * sum(total[moment - 1 - number] for number in range(count)) / (count * BUCKET)
    away = tokens * sum(total[moment + 1 + number] for number in range(count)) / (count * BUCKET)
    loss = 1 - away / before
    print(
        f"{PROCESSES * CALLERS} callers of {tokens} tokens, {replicas} replicas: "
        f"{before:.0f} tokens/s, {away:.0f} with one away: "
        f"{loss:.1%} lost, {loss - 1 / replicas:+.1%} beyond its share; {len(failed)} calls failed {failed[:1]}",
        flush=True,
    )


async def main(arguments: argparse.Namespace) -> None:
    folder = write_demo_checkpoint(cache_folder() / "bench", bench_model(7168, 2048))
    options = ["--backend", arguments.backend, "--shared-memory-bytes", str(16 << 30)]
    gpus = max(1, torch.cuda.device_count())
    for tokens in arguments.tokens:
        cluster = LocalCluster(
            folder,
            [f"0-{LOCAL_EXPERTS - 1}"] * arguments.replicas,
            options,
            each=lambda index: Each(environment={"CUDA_VISIBLE_DEVICES": str(index % gpus)}),
        )
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(cluster)
            await lose(cluster, tokens, arguments.seconds)


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--worker"]:
        uvloop.run(worker(int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]))
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--backend", default="cutile")
        parser.add_argument("--replicas", type=int, default=2)
        parser.add_argument("--seconds", type=float, default=6.0, help="before the kill, and after it")
        parser.add_argument("--tokens", type=int, nargs="+", default=(4, 64))
        uvloop.run(main(parser.parse_args()))
