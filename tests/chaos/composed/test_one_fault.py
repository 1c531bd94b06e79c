"""One replica of two is silent, silent in one direction, slow or flapping: what that costs at default settings."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.chaos.composed.faults import ON_PLACE
from tests.chaos.composed.run import make_models
from tests.chaos.composed.schedule import Plan
from tests.chaos.composed.speakers import Speaker
from tests.chaos.composed.stage import Models, Stage

VICTIM = "low-0"
CALLERS = 4
CALM_SECONDS, FAULT_SECONDS = 1.0, 3.5
LEFT_WITHIN = 2.0
SLACK = 0.5
"""Seconds that a busy machine may take beside."""
WIRES = ("grpc", "unix")
LANES = ("default", "thread", "unix-lane")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@dataclass(slots=True)
class Load:
    """Callers of one coordinator, and what they saw. Times are monotonic."""

    speaker: Speaker
    calls: list[tuple[float, float, bool]] = field(default_factory=list)
    """Beginning, end, and whether the victim had a part in the answer."""
    left: list[float] = field(default_factory=list)
    """Looks at which the victim was out of use or asked only in need."""
    over: bool = False

    def longest(self, since: float) -> float:
        """Seconds of the longest call that ended after `since`."""
        return max(ended - began for began, ended, _ in self.calls if ended > since)

    def left_after(self, since: float) -> float:
        """Seconds from `since` until the victim was left."""
        return min((look - since for look in self.left if look > since), default=float("inf"))

    async def call(self, victim: str) -> None:
        number = 0
        while not self.over:
            number += 1
            case, began = self.speaker.cases[number % len(self.speaker.cases)], time.monotonic()
            result = await self.speaker.call(case)
            assert self.speaker.error(result, case) is None
            self.calls.append((began, time.monotonic(), victim in {one.address for one in result.servers}))

    async def look(self, victim: str) -> None:
        while not self.over:
            (member,) = (member for member in self.speaker.members if member.transport.address == victim)
            if member.slow or not member.in_use:
                self.left.append(time.monotonic())
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def load(way: str, models: Models, *, slow: bool = False) -> AsyncIterator[tuple[Load, Stage]]:
    """Calls that go one way, all of them answered and right."""
    plan = Plan(0, (way,), {VICTIM: "slow"} if slow else {}, (), (VICTIM,))
    with tempfile.TemporaryDirectory(prefix="expertd-chaos-") as folder:
        async with (
            Stage(plan, models, Path(folder)) as stage,
            Speaker(way, stage.servers_file(way), None, models.first, hurried=False) as speaker,
        ):
            found = Load(speaker)
            place = stage.places[VICTIM]
            victim = place.unix.address if way.startswith("unix") else place.tcp.address
            async with asyncio.TaskGroup() as group:
                for _ in range(CALLERS):
                    group.create_task(found.call(victim))
                group.create_task(found.look(victim))
                try:
                    yield found, stage
                finally:
                    found.over = True


async def under(kind: str, way: str, models: Models) -> tuple[Load, float]:
    """Calls before and during a fault of the victim, and when that began."""
    async with load(way, models) as (found, stage):
        await asyncio.sleep(CALM_SECONDS)
        assert any(had_part for *_, had_part in found.calls)
        began = time.monotonic()
        async with ON_PLACE[kind](stage.places[VICTIM], stage):
            await asyncio.sleep(FAULT_SECONDS)
        told = f"left after {found.left_after(began):.2f} s, longest call {found.longest(began):.2f} s"
        print(f"{kind}, {way}: {len(found.calls)} calls, {told}, {found.speaker.repeats:.0f} repeats")
        return found, began


@pytest.mark.parametrize(
    ("kind", "way"),
    # What is frozen and not here is in tests/client/call/test_silence.py.
    [
        *(("freeze", way) for way in ("unix", "unix-lane")),
        *((kind, way) for kind in ("no_requests", "no_replies") for way in WIRES),
    ],
)
async def test_a_silent_replica_is_left_within_two_seconds_and_costs_one_repeat_a_caller(
    models: Models, kind: str, way: str
) -> None:
    found, began = await under(kind, way, models)
    assert found.left_after(began) < LEFT_WITHIN + SLACK
    assert found.longest(began) < LEFT_WITHIN + 2 * SLACK
    assert found.speaker.repeats <= 2 * CALLERS
    # Nobody waits for it any more.
    assert sum(start > began + LEFT_WITHIN + 2 * SLACK for start, *_ in found.calls) > CALLERS


@pytest.mark.parametrize("kind", ["no_requests", "no_replies"])
@pytest.mark.parametrize("way", LANES)
async def test_callers_of_a_lane_do_not_notice_what_becomes_of_the_connection_beside_it(
    models: Models, way: str, kind: str
) -> None:
    found, began = await under(kind, way, models)
    assert found.longest(began) < LEFT_WITHIN + 2 * SLACK
    assert found.speaker.repeats <= CALLERS


@pytest.mark.parametrize("way", [*WIRES, *LANES])
async def test_a_slow_replica_is_left_within_two_seconds_and_nothing_is_repeated(models: Models, way: str) -> None:
    began = time.monotonic()
    async with load(way, models, slow=True) as (found, _):
        began = time.monotonic()
        await asyncio.sleep(FAULT_SECONDS)
    print(f"slow, {way}: {len(found.calls)} calls, left after {found.left_after(began):.2f} s")
    assert found.left_after(began) < LEFT_WITHIN + SLACK
    assert found.speaker.repeats == 0
    later = [had_part for start, _, had_part in found.calls if start > began + LEFT_WITHIN + SLACK]
    assert len(later) > CALLERS
    assert sum(later) <= len(later) / 10


@pytest.mark.parametrize(("kind", "way"), [*(("flap", way) for way in WIRES), *(("stutter", way) for way in LANES)])
async def test_a_flapping_replica_holds_up_no_call_and_costs_few_repeats(models: Models, kind: str, way: str) -> None:
    found, began = await under(kind, way, models)
    assert found.left_after(began) < LEFT_WITHIN + SLACK
    assert found.longest(began) < 2 * SLACK
    # Every 0.4 s it is gone again: what is under way then is repeated, and what is sent before that is known.
    assert found.speaker.repeats <= 2 * CALLERS * FAULT_SECONDS / 0.4
