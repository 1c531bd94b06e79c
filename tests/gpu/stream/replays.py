"""A decode step of all layers in one CUDA graph, replayed many times: nothing leaks, hangs or is wrong.

python -m tests.gpu.stream.replays ADDRESS... [--replays 10000] [--tokens 4]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from expertd.client.sync import SyncCoordinator

EVERY = 100
"""Replays between two looks at the sums."""


def step(moe: SyncCoordinator, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Hidden states through all layers, each with what the last one has made of them."""
    for layer in moe.layers:
        hidden = hidden + moe.on_stream(layer, hidden, ids, weights)
    return hidden


def replay(addresses: Sequence[str], replays: int, tokens: int) -> None:
    """Raises AssertionError, or what the servers answered."""
    with SyncCoordinator(addresses) as moe:
        moe.prepare_stream(tokens, "cuda", timeout=10.0)
        model = moe.model
        hidden = torch.randn(tokens, model.hidden_size, device="cuda").bfloat16()
        ids = torch.rand(tokens, model.n_routed_experts, device="cuda").argsort(dim=1)
        ids = ids[:, : model.num_experts_per_tok].contiguous()
        weights = torch.rand(tokens, model.num_experts_per_tok, device="cuda")
        step(moe, hidden, ids, weights)
        moe.check()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step(moe, hidden, ids, weights)
        torch.cuda.synchronize()
        used, begun = torch.cuda.mem_get_info()[0], time.monotonic()
        for number in range(replays):
            if number % EVERY == 0:
                hidden.normal_()
                expected = step(moe, hidden, ids, weights)
                output.fill_(float("nan"))
            graph.replay()
            if number % EVERY == EVERY - 1:
                assert torch.equal(output, expected), f"replay {number}"
        moe.check()
        seconds, more = time.monotonic() - begun, used - torch.cuda.mem_get_info()[0]
        print(f"{replays} replays of {len(moe.layers)} layers in {seconds:.1f} s, {more} bytes more")
        assert more < 16 << 20


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--replays", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=4)
    arguments = parser.parse_args()
    replay(arguments.addresses, arguments.replays, arguments.tokens)
