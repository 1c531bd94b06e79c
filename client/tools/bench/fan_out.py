"""One token whose experts are on one server, on some, or on all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from expertd.client.sync import SyncCoordinator
from expertd.client.tools.bench.report import Comparison
from expertd.client.tools.bench.servers import Way
from expertd.client.tools.bench.timing import compare, in_turn, in_turn_here
from expertd.kernels.model.config import MoeConfig

SPANS = (1, 4, 8)
COMPARED_WITH = "the same on one server"


async def measure_fan_out(way: Way, seconds: float) -> list[Comparison]:
    """Through `Coordinator`, and through `SyncCoordinator` on another thread."""
    moe, servers = way.moe, len(way.addresses)
    layer, hidden = moe.layers[0], torch.randn(1, moe.model.hidden_size, device=way.device).bfloat16()
    weights = torch.rand(1, moe.model.num_experts_per_tok)
    choices = {span: choice_on(moe.model, servers, span) for span in spans_of(moe.model, servers)}

    async def awaited(ids: Tensor) -> None:
        await moe.execute(layer, hidden, topk_ids=ids, topk_weights=weights)
        way.settle()

    def waited(blocking: SyncCoordinator, ids: Tensor) -> None:
        blocking.execute(layer, hidden, topk_ids=ids, topk_weights=weights)
        way.settle()

    def from_a_thread() -> dict[str, list[float]]:
        with way.blocking() as blocking:
            calls = {_name(span, "from a thread"): partial(waited, blocking, ids) for span, ids in choices.items()}
            return in_turn_here(calls, seconds)

    calls: dict[str, Callable[[], Awaitable[None]]] = {
        _name(span, "awaited"): partial(awaited, ids) for span, ids in choices.items()
    }
    rows = compare(way.transport, 1, await in_turn(calls, seconds))
    return rows + compare(way.transport, 1, await asyncio.to_thread(from_a_thread))


def spans_of(model: MoeConfig, servers: int) -> Sequence[int]:
    """Over how many of `servers` one token is spread in turn: at least one, at most as many as it can reach."""
    most = min(servers, model.num_experts_per_tok)
    return [*(span for span in SPANS if span < most), most]


def choice_on(model: MoeConfig, servers: int, span: int) -> Tensor:
    """Ids [1, k] of a token's experts, dealt out to the first `span` of `servers` that share the experts evenly."""
    places = torch.arange(model.num_experts_per_tok)
    return (places % span * (model.n_routed_experts // servers) + places // span).unsqueeze(0)


def _name(span: int, how: str) -> str:
    return f"{span} server{'s' if span > 1 else ''}, {how}"
