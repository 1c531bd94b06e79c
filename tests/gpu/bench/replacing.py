"""What calls take while another layer's experts are replaced: all 32 of them, 1.4 GB.

    python -m tests.gpu.bench.replacing [--backend cutile] [--changes 4]

prints how long each change took, and medians and 99th percentiles of calls of 64 tokens beside it and without.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from dataclasses import replace

import torch
import uvloop

from expertd.client.base.quantiles import p50_p99
from expertd.client.placement.admin import update_shard
from expertd.client.tools.bench.servers import LOCAL_EXPERTS, bench_model
from expertd.client.tools.cluster import LocalCluster
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.security import ClientSecurity
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.kernels.weights.files import cache_folder
from expertd.proto.base.errors import StalePlacement
from expertd.proto.base.malloc import keep_freed_memory
from tests.gpu.bench.serving import call_of

TOKENS = 64
HALVES = tuple(range(LOCAL_EXPERTS)), tuple(range(LOCAL_EXPERTS, 2 * LOCAL_EXPERTS))


async def keep_calling(transport: SharedMemoryTransport, took: list[tuple[float, float]], over: asyncio.Event) -> None:
    """Through shared memory; begin and seconds of each call. The first layer stays as it is."""
    number = 0
    shard = await transport.get_shard(30.0)
    call = call_of(shard, TOKENS, True)
    while not over.is_set():
        number += 1
        began = time.perf_counter()
        try:
            await transport.execute(replace(call, request_id=number))
        except StalePlacement:
            call = replace(call, placement_epoch=(await transport.get_shard(30.0)).placement_epoch)
            continue
        took.append((began, time.perf_counter() - began))


def told(name: str, took: list[float]) -> None:
    p50, p99 = p50_p99(took)
    print(f"{name:18} {len(took):6} calls, p50 {1e6 * p50:8.0f} us, p99 {1e6 * p99:8.0f} us, longest {max(took):.4f} s")


async def main(arguments: argparse.Namespace) -> None:
    model = replace(bench_model(7168, 2048), n_routed_experts=2 * LOCAL_EXPERTS, moe_layers=2)
    if arguments.backend != "cutile":
        model = replace(model, hidden_size=256, moe_intermediate_size=128)
    folder = write_demo_checkpoint(cache_folder() / "bench", model)
    options = ["--backend", arguments.backend, "--admin-listen", "127.0.0.1:0"]
    async with contextlib.AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(LocalCluster(folder, [f"0-{LOCAL_EXPERTS - 1}"], options))
        (address,) = cluster.addresses
        transport = SharedMemoryTransport(GrpcTransport(address), 2 << 30, 1 << 30)
        stack.push_async_callback(transport.close)
        took: list[tuple[float, float]] = []
        over = asyncio.Event()
        shard = await transport.get_shard(30.0)
        last = shard.layers[-1]
        async with asyncio.TaskGroup() as group:
            group.create_task(keep_calling(transport, took, over))
            await asyncio.sleep(arguments.calm)
            changes = []
            for number in range(arguments.changes):
                epoch = (await transport.get_shard(30.0)).placement_epoch
                began = time.perf_counter()
                async for _ in update_shard(
                    shard.admin_address, ClientSecurity(), epoch, {last: HALVES[(number + 1) % 2]}
                ):
                    pass
                changes.append((began, time.perf_counter()))
                print(f"change {number}: {changes[-1][1] - began:.3f} s", flush=True)
                await asyncio.sleep(arguments.calm)
            over.set()
    within = [spent for began, spent in took if any(start <= began <= end for start, end in changes)]
    without = [spent for began, spent in took if not any(start <= began <= end for start, end in changes)]
    told("beside a change", within)
    told("without", without)


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="cutile")
    parser.add_argument("--changes", type=int, default=4)
    parser.add_argument("--calm", type=float, default=3.0, help="seconds before, between and after changes")
    uvloop.run(main(parser.parse_args()))
