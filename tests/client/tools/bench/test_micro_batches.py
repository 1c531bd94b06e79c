"""Two micro-batches with a server in this process: what overlaps with what."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertd.client.call.pending import PendingCall
from expertd.client.coordinator import Coordinator
from expertd.client.sync import SyncCoordinator
from expertd.client.tools.bench.micro_batches import CallerWork, MicroBatches
from expertd.client.tools.bench.servers import Way
from tests.support.coordinators import QUICK
from tests.support.serving import running_server

ORDERS = {
    "one_after_another": ["submit", "collect", "work"] * 2,
    "in_turns": ["submit", "work", "collect"] * 2,
    "together": ["submit", "submit", "work", "collect", "work", "collect"],
    "at_once": ["submit", "collect", "work", "work"],
}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a caller does, in order."""
    seen: list[str] = []

    def noting(event: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def note(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
            seen.append(event)
            return do(*arguments, **named)

        return note

    monkeypatch.setattr(SyncCoordinator, "submit", noting("submit", SyncCoordinator.submit))
    monkeypatch.setattr(PendingCall, "result", noting("collect", PendingCall.result))
    monkeypatch.setattr(CallerWork, "__call__", noting("work", CallerWork.__call__))
    return seen


async def test_the_caller_computes_for_one_half_while_the_server_has_the_other(
    small_model: Path, events: list[str]
) -> None:
    def check(way: Way) -> None:
        with way.blocking() as moe:
            batches = MicroBatches(way, moe, 6, 1e-4)
            for name, order in ORDERS.items():
                events.clear()
                getattr(batches, f"_{name}")()
                assert events == order, name
            rows = batches.compare(0.01)
            assert rows[0].ratio == 1
            assert len({row.calls for row in rows}) == 1

    async with running_server(small_model, range(16)) as server:
        addresses = [str(server.address)]
        async with Coordinator(addresses, QUICK) as moe:
            await asyncio.to_thread(check, Way("shm", addresses, moe))


def test_what_the_caller_computes_takes_as_long_as_it_should_or_longer_on_a_crowded_machine() -> None:
    work = CallerWork(Way("shm", [], Coordinator(["unused:1"])), 5e-3)
    assert 1e-3 < work.seconds < 100e-3
