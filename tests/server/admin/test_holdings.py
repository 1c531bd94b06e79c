"""When weights that a server no longer answers with are freed."""

import asyncio
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from expertd.kernels.model.config import MoeConfig
from expertd.proto.base.errors import ExpertdError, Unavailable
from expertd.server.admin.counting import counted
from expertd.server.admin.holdings import Change, Holdings
from expertd.server.scheduling.generations import Generation, Generations
from expertd.server.scheduling.shard import Shard
from expertd.server.telemetry.metrics import Metrics
from tests.support.serving import until


class StandInNode:
    """Has all experts of all layers, and notes which are dropped."""

    def __init__(self) -> None:
        self.dropped: list[int] = []

    def computable(self, key: int) -> set[int]:
        return {0, 1}

    async def drop(self, key: int) -> None:
        self.dropped.append(key)


class StandInEngine:
    """Has a request under way at each epoch of `used`."""

    closed_because = None

    def __init__(self) -> None:
        self.placement = SimpleNamespace(epoch=1)
        self.used: set[int] = set()

    def tell(self, generations: Generations) -> None:
        self.placement = SimpleNamespace(epoch=generations.serving.shard.placement_epoch)

    def uses_before(self, epoch: int) -> bool:
        return any(used < epoch for used in self.used)


class StandInCheckpoint:
    closed = False

    def close(self) -> None:
        self.closed = True


def generations_of(keys: Mapping[int, int], checkpoint: StandInCheckpoint) -> Generations:
    """Layers of two experts each, with their keys."""
    config = cast(MoeConfig, SimpleNamespace(moe_layers=(1, 2)))
    shard = Shard(config, "a model", 1, dict.fromkeys(keys, (0, 1)), keys=keys)
    return Generations(Generation(shard, cast(Any, checkpoint), cast(Any, None)))


@pytest.mark.parametrize(
    ("raised", "heard"),
    [
        (Unavailable("a device was lost"), "Unavailable: a device was lost"),
        (FileNotFoundError(2, "No such file", "/model"), "ServerFault: nothing was changed: .* '/model'"),
    ],
)
async def test_what_a_change_fails_with_has_a_name(raised: Exception, heard: str) -> None:
    engine = StandInEngine()
    begun = generations_of({1: 1}, StandInCheckpoint())
    held = Holdings(begun, cast(Any, StandInNode()), cast(Any, engine), Metrics(CollectorRegistry()), engine.tell)
    with pytest.raises(ExpertdError) as found:
        async with held.changing(1, Change()):
            raise raised
    assert re.fullmatch(heard, f"{type(found.value).__name__}: {found.value}")


async def test_weights_wait_for_the_requests_of_the_switch_that_gave_them_up() -> None:
    node, engine, first, second = StandInNode(), StandInEngine(), StandInCheckpoint(), StandInCheckpoint()
    begun = generations_of({1: 1, 2: 2}, first)
    held = Holdings(begun, cast(Any, node), cast(Any, engine), Metrics(), engine.tell)
    engine.used = {held.epoch}
    earlier = asyncio.create_task(held.switch(generations_of({1: 3, 2: 2}, first), Change(), ""))
    await until(lambda: held.epoch > 1)
    engine.used.add(held.epoch)
    later = asyncio.create_task(held.switch(generations_of({1: 3}, second), Change(), ""))
    await until(lambda: held.generations.keys == {3})
    engine.used.remove(1)
    await earlier
    assert (node.dropped, first.closed) == ([1], False)
    engine.used.clear()
    await later
    assert (node.dropped, first.closed, second.closed) == ([1, 2], True, False)


async def test_who_leaves_after_the_switch_leaves_a_change_that_was_made(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    metrics, engine = Metrics(CollectorRegistry()), StandInEngine()
    begun = generations_of({1: 1}, StandInCheckpoint())
    held = Holdings(begun, cast(Any, StandInNode()), cast(Any, engine), metrics, engine.tell)
    engine.used = {held.epoch}

    async def change() -> None:
        with counted(metrics) as change:
            async with held.changing(1, change):
                await held.switch(generations_of({1: 2}, StandInCheckpoint()), change, "layer 1: 0-1")

    changing = asyncio.create_task(change())
    await until(lambda: held.epoch > 1)
    changing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await changing
    assert f"epoch {held.epoch}: layer 1: 0-1" in caplog.text
    assert [metrics.updates.labels(outcome)._value.get() for outcome in ("ok", "cancelled")] == [1, 0]
    engine.used.clear()
