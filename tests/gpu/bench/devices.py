"""One server on two GPUs against one on one: correctness, calls, bytes that leave, and one GPU killed under load.

    timeout 420 python -m tests.gpu.bench.devices [--tokens 64 16384] [--seconds 4]

The layer is DeepSeek-V3's with 32 experts. Prints a line for each figure; ends with 1 where sums differ.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import torch
import uvloop

from expertd.client.tools.bench.servers import LOCAL_EXPERTS, bench_model
from expertd.client.tools.cluster import LocalCluster
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.files import cache_folder
from expertd.proto.base.errors import ExpertdError
from expertd.proto.base.malloc import keep_freed_memory
from expertd.proto.codec import ExecuteCall, ShardInfo
from tests.gpu.bench.serving import STAGES, call_of

BOUND = 2e-3
"""Of BF16 sums, each rounded once, that were added in another order."""
TOP_K = 2


def call_for_two(shard: ShardInfo, tokens: int) -> ExecuteCall:
    """Every token for two of the server's experts, whichever, under any placement."""
    torch.manual_seed(tokens)
    return replace(
        call_of(shard, tokens, True),
        placement_epoch=None,
        expert_ids=torch.rand(tokens, LOCAL_EXPERTS).argsort(dim=1)[:, :TOP_K].int().contiguous(),
        weights=torch.rand(tokens, TOP_K) + 0.1,
    )


@asynccontextmanager
async def serving(
    folder: Path, largest: int, *options: str, failpoints: str = ""
) -> AsyncIterator[tuple[SharedMemoryTransport, ShardInfo]]:
    os.environ["EXPERTD_FAILPOINTS"] = failpoints
    common = ["--backend", "cutile", "--shared-memory-bytes", str(16 << 30)]
    common += ["--max-tokens-per-request", str(largest), "--max-batch-tokens", str(largest)]
    began = time.perf_counter()
    async with LocalCluster(folder, [f"0-{LOCAL_EXPERTS - 1}"], [*common, *options], 240.0) as cluster:
        print(
            f"ready after {time.perf_counter() - began:.0f} s: {' '.join(options) or 'one GPU'} {failpoints}",
            flush=True,
        )
        transport = SharedMemoryTransport(GrpcTransport(cluster.addresses[0]), 2 << 30, 1 << 30)
        try:
            yield transport, await transport.get_shard(30.0)
        finally:
            await transport.close()


async def timed(
    transport: SharedMemoryTransport, shard: ShardInfo, sizes: Sequence[int], seconds: float
) -> dict[int, tuple[torch.Tensor, dict[str, float]]]:
    """By tokens, the sums and medians in us."""
    found = {}
    for tokens in sizes:
        call = call_for_two(shard, tokens)
        sums = (await transport.execute(call)).partials.clone()
        for _ in range(10):
            await transport.execute(call)
        spent: list[tuple[float, ...]] = []
        began = time.perf_counter()
        while time.perf_counter() - began < seconds or len(spent) < 5:
            started = time.perf_counter()
            result = await transport.execute(call)
            spent.append((time.perf_counter() - started, *result.timings))
        medians = {name: 1e6 * statistics.median(one[at] for one in spent) for at, name in enumerate(("call", *STAGES))}
        found[tokens] = (sums, medians)
        print(f"  {tokens:6} tokens: " + " ".join(f"{name} {us:.0f}" for name, us in medians.items()), flush=True)
    return found


async def killed(folder: Path, largest: int, seconds: float) -> bool:
    """Whether no call failed or was wrong while one GPU of two, with copies of all experts on the other, was lost."""
    both = ("--devices", "0-1", "--device-experts", str(LOCAL_EXPERTS))
    async with serving(folder, largest, *both, failpoints="lost_device=0.001,seed=5") as (transport, shard):
        call = call_for_two(shard, 64)
        expected = (await transport.execute(call)).partials.clone().float()
        failed = wrong = 0
        ends: list[float] = []
        began = time.perf_counter()
        lost = None
        while time.perf_counter() - began < seconds + 6:
            try:
                got = (await transport.execute(call)).partials.float()
                wrong += relative_error(got, expected) > BOUND
            except ExpertdError as error:
                failed += 1
                print("  failed:", error, flush=True)
            ends.append(time.perf_counter() - began)
            if lost is None and len(ends) % 50 == 0:
                now = await transport.get_shard(5.0)
                lost = ends[-1] if any(one.lost for one in now.devices) else None
        longest = max(b - a for a, b in itertools.pairwise(ends))
        print(f"killed: lost by {lost} s, {len(ends)} calls, {failed} failed, {wrong} wrong, longest {longest:.3f} s")
        return lost is not None and not failed and not wrong


def bytes_out(tokens: int, width: int = 7168) -> None:
    """Of replies in BF16: one server for 32 experts, against two for 16 each, that get the tokens of their experts."""
    torch.manual_seed(0)
    ids = torch.rand(tokens, 256).argsort(dim=1)[:, :8]
    rows = [int(((ids >= first) & (ids < end)).any(dim=1).sum()) for first, end in ((0, 32), (0, 16), (16, 32))]
    one, two = 2 * width * rows[0], 2 * width * (rows[1] + rows[2])
    print(f"bytes out, 8 of 256 at random, {tokens} tokens: node {one}, two servers {two}, {one / two:.2f}x")
    print(f"bytes out where every token is for both: {2 * width * tokens} and {4 * width * tokens}, 0.50x", flush=True)


async def main(arguments: argparse.Namespace) -> int:
    if torch.cuda.device_count() < 2:
        print("needs two GPUs")
        return 2
    largest = max(arguments.tokens)
    folder = write_demo_checkpoint(
        cache_folder() / "bench-devices", replace(bench_model(7168, 2048), num_experts_per_tok=TOP_K)
    )
    async with serving(folder, largest) as (transport, shard):
        one = await timed(transport, shard, arguments.tokens, arguments.seconds)
    async with serving(folder, largest, "--devices", "0-1") as (transport, shard):
        print("devices:", [(device.number, device.name) for device in shard.devices])
        both = await timed(transport, shard, arguments.tokens, arguments.seconds)
    wrong = False
    for tokens in arguments.tokens:
        error = relative_error(both[tokens][0].float(), one[tokens][0].float())
        wrong = wrong or not error < BOUND
        before, after = one[tokens][1], both[tokens][1]
        device = [sum(its[name] for name in ("compute", "copy_out")) for its in (before, after)]
        print(
            f"{tokens} tokens: error {error:.1e}; call {after['call'] / before['call']:.2f}x,"
            f" compute with adding and copying out {device[1] / device[0]:.2f}x",
            flush=True,
        )
    bytes_out(largest)
    well = await killed(folder, largest, arguments.seconds)
    return 1 if wrong or not well else 0


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 64, 16384))
    parser.add_argument("--seconds", type=float, default=4.0)
    raise SystemExit(uvloop.run(main(parser.parse_args())))
