"""One token through all layers, one after another, as when a model generates."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertd.client.call.result import MoeResult
from expertd.client.tools.bench.calls import FLOORS, Floors
from expertd.client.tools.bench.report import Comparison
from expertd.client.tools.bench.servers import Way
from expertd.client.tools.bench.timing import comparison_of, repeat, repeat_here

COMPARED_WITH = "the same bytes without expertd, once a layer, and computing"


@dataclass(slots=True)
class Spent:
    """Seconds of each call, by layer."""

    calls: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    computing: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def note(self, layer: int, started: float, result: MoeResult) -> None:
        self.calls[layer].append(time.perf_counter() - started)
        self.computing[layer].append(max(server.timings.compute for server in result.servers))

    def comparison(self, way: Way, what: str, times: list[float], moved: float) -> Comparison:
        """Beside a floor in which each layer's bytes take `moved` seconds."""
        floor = sum(moved + statistics.median(computing) for computing in self.computing.values())
        parts = {f"layer {layer}": statistics.median(seconds) for layer, seconds in self.calls.items()}
        return comparison_of(way.transport, what, 1, times, floor, parts)


async def measure_layers(way: Way, floors: Floors) -> list[Comparison]:
    """Through `Coordinator`, and through `SyncCoordinator` on another thread."""
    moe, model = way.moe, way.moe.model
    hidden = torch.randn(1, model.hidden_size, device=way.device).bfloat16()
    choices = {layer: _choice(layer, model.n_routed_experts, model.num_experts_per_tok) for layer in moe.layers}
    exchange = floors.exchange(model.hidden_size, 1, model.num_experts_per_tok)
    below = {row.what: row.p50 async for row in floors.measure(exchange, 1)}
    moved = below.get(FLOORS.get(way.transport, ""), 0.0)
    awaited, waited = Spent(), Spent()

    async def all_layers() -> None:
        for layer, (ids, weights) in choices.items():
            started = time.perf_counter()
            result = await moe.execute(layer, hidden, topk_ids=ids, topk_weights=weights)
            way.settle()
            awaited.note(layer, started, result)

    def all_layers_here() -> list[float]:
        def run() -> None:
            for layer, (ids, weights) in choices.items():
                started = time.perf_counter()
                result = blocking.execute(layer, hidden, topk_ids=ids, topk_weights=weights)
                way.settle()
                waited.note(layer, started, result)

        with way.blocking() as blocking:
            return repeat_here(run, floors.seconds)[0]

    times, _ = await repeat(all_layers, 1, floors.seconds)
    times_here = await asyncio.to_thread(all_layers_here)
    whole = f"all {len(choices)} layers"
    return [
        awaited.comparison(way, f"{whole}, awaited", times, moved),
        waited.comparison(way, f"{whole}, from a thread", times_here, moved),
    ]


def _choice(layer: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Ids and weights [1, k], the same every time."""
    generator = torch.Generator().manual_seed(layer)
    return torch.randperm(experts, generator=generator)[:top_k].unsqueeze(0), torch.rand(1, top_k, generator=generator)
