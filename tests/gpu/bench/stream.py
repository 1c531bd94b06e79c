"""What stream-ordered calls cost on the caller's CUDA stream, one by one, in a graph, and many in one graph.

    python -m tests.gpu.bench.stream [--server-gpu 1] [--tokens 1 64 1024 16384] [--layers 58]

prints medians of the time from before a call to after it on the stream of GPU 0, beside what the server's kernels
took; sums are compared with those through host memory first. With --server-gpu 0 start NVIDIA MPS before.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable

import torch
import uvloop
from torch import Tensor

from expertd.client.base.quantiles import p50_p99
from expertd.client.sync import SyncCoordinator
from expertd.client.tools.bench.servers import LOCAL_EXPERTS, bench_model
from expertd.client.tools.bench.stream import captured
from expertd.client.tools.bench.timing import repeat_on_stream
from expertd.client.tools.cluster import Each, LocalCluster
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.kernels.weights.files import cache_folder

HIDDEN_SIZE, INTERMEDIATE_SIZE = 7168, 2048


def enqueue_each(
    moe: SyncCoordinator, layers: int, out: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Callable[[], None]:
    def call() -> None:
        for _ in range(layers):
            moe.on_stream(moe.layers[0], hidden, ids, weights, out)

    return call


def measure(address: str, arguments: argparse.Namespace) -> None:
    with SyncCoordinator([address]) as moe:
        moe.prepare_stream(max(arguments.tokens), "cuda:0", timeout=5.0)
        reached = moe.stream_on_gpu
        print(f"hidden states and sums in the GPU's memory: {sorted(reached)}", flush=True)
        top_k = moe.model.num_experts_per_tok
        for tokens in arguments.tokens:
            hidden = torch.randn(tokens, HIDDEN_SIZE).bfloat16()
            ids = torch.full((tokens, top_k), -1)
            ids[:, 0] = torch.randint(LOCAL_EXPERTS, (tokens,))
            weights = torch.rand(tokens, top_k)
            expected = moe(moe.layers[0], hidden, topk_ids=ids, topk_weights=weights)
            there = hidden.cuda(), ids.cuda(), weights.cuda()
            out = torch.empty_like(there[0])
            result = moe.execute(moe.layers[0], hidden, topk_ids=ids, topk_weights=weights)
            compute = 1e6 * result.servers[0].timings.compute
            ways = {"one by one": (1, False), "in a graph": (1, True)}
            if arguments.layers > 1:
                ways[f"{arguments.layers} in a graph"] = (arguments.layers, True)
            for way, (layers, graph) in ways.items():
                call = enqueue_each(moe, layers, out.fill_(torch.nan), *there)
                times, _ = repeat_on_stream(captured(call) if graph else call, arguments.seconds)
                moe.check()
                same = torch.equal(out.cpu(), expected)
                p50, p99 = (1e6 * seconds for seconds in p50_p99(times))
                print(
                    f"{tokens:6} tokens {way:16} p50 {p50:9.1f} p99 {p99:9.1f} us {len(times):6} times"
                    f"  a call {p50 / layers:8.1f}  kernels {compute:8.1f}  bits {'equal' if same else 'DIFFER'}",
                    flush=True,
                )


async def main(arguments: argparse.Namespace) -> None:
    folder = write_demo_checkpoint(cache_folder() / "bench", bench_model(HIDDEN_SIZE, INTERMEDIATE_SIZE))
    other = 1 - arguments.server_gpu
    visible = str(arguments.server_gpu) if arguments.alone else f"{arguments.server_gpu},{other}"
    options = ["--backend", "cutile", "--max-tokens-per-request", "16384", "--shared-memory-bytes", str(16 << 30)]

    def each(_: int) -> Each:
        return Each(environment={"CUDA_VISIBLE_DEVICES": visible})

    async with LocalCluster(folder, [f"0-{LOCAL_EXPERTS - 1}"], options, each=each) as cluster:
        try:
            await asyncio.to_thread(measure, cluster.addresses[0], arguments)
        finally:
            print("\n".join(cluster.servers[0].log.read_text().splitlines()[-6:]), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--server-gpu", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="the server sees no other GPU")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 64, 1024, 16384))
    parser.add_argument("--layers", type=int, default=58, help="in one graph; 1: no such graph")
    uvloop.run(main(parser.parse_args()))
