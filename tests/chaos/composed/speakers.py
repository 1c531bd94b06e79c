"""Coordinators of every kind, and calls whose results are known."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from expertd.client.call.result import MoeResult
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.fleet.discovery import FileServers
from expertd.client.fleet.member import Member
from expertd.client.sync import SyncCoordinator
from expertd.client.telemetry.metrics import CoordinatorMetrics
from tests.chaos.composed.schedule import NEXT
from tests.chaos.load import Case, make_cases

EXACT = {"hidden_dtype": torch.bfloat16, "reply_dtype": torch.float32, "output_dtype": torch.float32}
SPEAKERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "default": {},
        "thread": {},
        NEXT: {},
        "grpc": {"shared_memory_bytes": 0},
        "grpc-hedged": {"shared_memory_bytes": 0, "hedge_quantile": 0.9},
        "exact-grpc": {"shared_memory_bytes": 0, **EXACT},
        "exact-lane-hedged": {"hedge_quantile": 0.9, **EXACT},
        "unix": {"shared_memory_bytes": 0},
        "unix-lane": {},
    }
)
"""Options beside the defaults: FP8 out, BF16 back, shared memory, no hedging. Those named unix reach servers so."""
ROUNDED, NOT_ROUNDED = 1e-2, 1e-5
"""Relative errors of a token's output that BF16 replies and outputs, or sums in another order, may cause."""
SIZES = (1, 3, 8, 20)
LOOK_SECONDS = 0.2
"""Between two looks at the list of servers."""


class Speaker:
    """A coordinator, awaited or on a thread of its own."""

    def __init__(self, name: str, servers: Path, fingerprint: str | None, model: Path, *, hurried: bool) -> None:
        """`hurried` gives up attempts early, since there will be no answer to some."""
        options = {**SPEAKERS[name], **({"attempt_timeout": 2.0} if hurried else {})}
        self.name = name
        self.registry = CollectorRegistry()
        config = CoordinatorConfig(metrics=CoordinatorMetrics(self.registry), model_fingerprint=fingerprint, **options)
        discovery = FileServers(servers, seconds=LOOK_SECONDS)
        self._coordinator = Coordinator(discovery, config)
        self._blocking = SyncCoordinator(discovery, config) if name == "thread" else None
        if self._blocking is not None:
            self._coordinator = self._blocking._coordinator
        exact = config.reply_dtype == torch.float32
        self._tolerance = NOT_ROUNDED if exact else ROUNDED
        self.cases = cases_of(model, not exact)

    async def __aenter__(self) -> Speaker:
        if self._blocking is not None:
            await asyncio.to_thread(self._blocking.connect)
        else:
            await self._coordinator.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._blocking is not None:
            await asyncio.to_thread(self._blocking.close)
        else:
            await self._coordinator.close()

    @property
    def members(self) -> list[Member]:
        return list(self._coordinator._connected().membership.members.values())

    @property
    def repeats(self) -> float:
        """Retries and hedges of all calls."""
        names = ("expertd_coordinator_retries_total", "expertd_coordinator_hedges_total")
        return sum(self.registry.get_sample_value(name) or 0.0 for name in names)

    async def call(self, case: Case) -> MoeResult:
        if self._blocking is not None:
            return await asyncio.to_thread(
                self._blocking.execute, case.layer, case.hidden, topk_ids=case.ids, topk_weights=case.weights
            )
        return await self._coordinator.execute(case.layer, case.hidden, topk_ids=case.ids, topk_weights=case.weights)

    def error(self, result: MoeResult, case: Case) -> float | None:
        """Of the worst token; None where that is what rounding may cause, and nothing is missing."""
        error = worst_error(result.output, case.right)
        return None if error <= self._tolerance and not result.degraded_tokens else error


def worst_error(out: torch.Tensor, right: torch.Tensor) -> float:
    """The relative error of the token that has the largest; NaN where there is any."""
    difference = (out.double() - right.double()).norm(dim=1) / right.double().norm(dim=1)
    return float(difference.max())


@cache
def cases_of(model: Path, quantized: bool) -> list[Case]:
    """Computed once, whatever the seed."""
    return make_cases(model, 0, SIZES, quantized=quantized)
