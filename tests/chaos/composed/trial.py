"""One seed: a fleet, its coordinators, load, the faults of the plan, and what came of it all."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

from tests.chaos.composed.faults import befall, harmed
from tests.chaos.composed.history import (
    FEWEST_SETTLED,
    HUNG,
    LONGEST_CALL,
    LONGEST_SETTLING,
    RIGHT,
    WRONG,
    CallRecord,
    FaultRecord,
    History,
)
from tests.chaos.composed.schedule import NEXT, Fault, Plan, shard_of
from tests.chaos.composed.speakers import Speaker
from tests.chaos.composed.stage import Models, Stage, fingerprint_of
from tests.chaos.load import Case
from tests.support.fence.wrong import wrong

CALLERS = 2
"""Of each coordinator."""
PAUSE_SECONDS = 0.04
"""Between two calls, on average half as much; after one that failed always so much."""
UNANSWERED = frozenset({"drop", "reset"})
"""Failpoints of servers that keep silent for good: the latter where callers' sockets cannot be told apart."""
HANGING = 2 * LONGEST_CALL


class Trial:
    """The run of one plan."""

    def __init__(self, plan: Plan, models: Models) -> None:
        self._plan = plan
        self._models = models
        self.history = History(plan.seed, plan.places)
        self._began = time.monotonic()
        self._over = asyncio.Event()
        self.strikes = 0
        """Of failpoints."""

    async def run(self) -> History:
        """All of it. The history says whether anything was violated."""
        with tempfile.TemporaryDirectory(prefix="expertd-chaos-") as folder:
            async with Stage(self._plan, self._models, Path(folder)) as stage, AsyncExitStack() as stack:
                names = self._plan.coordinators
                speakers = [await stack.enter_async_context(self._speaker(name, stage)) for name in names]
                self._began = time.monotonic()
                async with self._load(speakers):
                    await self._befall_all(stage)
                    await self._settle(stage, speakers)
                self.history.repeats = {speaker.name: speaker.repeats for speaker in speakers}
                self.strikes = sum(place.strikes for place in stage.places.values())
        return self.history

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _speaker(self, name: str, stage: Stage) -> Speaker:
        # With one generation there is none to name.
        fingerprint = fingerprint_of(self._models.of(name)) if NEXT in self._plan.coordinators else None
        hurried = bool(UNANSWERED & {*self._plan.births.values()})
        return Speaker(name, stage.servers_file(name), fingerprint, self._models.of(name), hurried=hurried)

    async def _befall_all(self, stage: Stage) -> None:
        """The faults of the plan; all is mended when it returns."""
        births = [FaultRecord(kind, place, (place,), 0.0) for place, kind in self._plan.births.items()]
        self.history.faults += births
        async with asyncio.TaskGroup() as group:
            for fault in self._plan.faults:
                group.create_task(self._befall(fault, stage))
        await stage.mend()
        self.history.mended = self._now()
        for birth in births:
            birth.ended = self.history.mended

    async def _befall(self, fault: Fault, stage: Stage) -> None:
        await asyncio.sleep(fault.at - self._now())
        record = FaultRecord(fault.kind, fault.victim, harmed(fault, stage), self._now())
        self.history.faults.append(record)
        async with befall(fault, stage):
            await asyncio.sleep(fault.seconds)
        record.ended = self._now()

    async def _settle(self, stage: Stage, speakers: list[Speaker]) -> None:
        """Until every coordinator uses all servers of its model again, and has made some calls then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_SETTLING):
                while not all(_uses_all(speaker, stage) for speaker in speakers):
                    await asyncio.sleep(0.05)
            self.history.settled = self._now()
            async with asyncio.timeout(LONGEST_SETTLING):
                while any(self._settled_calls(speaker) < FEWEST_SETTLED for speaker in speakers):
                    await asyncio.sleep(0.05)
        if self.history.settled is None:
            for speaker in speakers:
                used = {member.transport.address: member.in_use or member.why_not for member in speaker.members}
                print(f"seed {self._plan.seed}: {speaker.name} after {LONGEST_SETTLING} s: {used}")

    def _settled_calls(self, speaker: Speaker) -> int:
        since = self.history.settled or 0.0
        return sum(call.coordinator == speaker.name and call.began > since for call in self.history.calls)

    @contextlib.asynccontextmanager
    async def _load(self, speakers: list[Speaker]) -> AsyncIterator[None]:
        """Calls all the while, from several callers of each coordinator."""
        calling = [
            asyncio.create_task(self._call_on(speaker, number)) for speaker in speakers for number in range(CALLERS)
        ]
        try:
            yield
        finally:
            self._over.set()
            await asyncio.gather(*calling)

    async def _call_on(self, speaker: Speaker, number: int) -> None:
        chance = random.Random(f"{self._plan.seed} {speaker.name} {number}")
        while not self._over.is_set():
            record = await self._call(speaker, chance.choice(speaker.cases))
            self.history.calls.append(record)
            await asyncio.sleep(PAUSE_SECONDS * (chance.random() if record.outcome == RIGHT else 1.0))

    async def _call(self, speaker: Speaker, case: Case) -> CallRecord:
        began, repeats, detail = self._now(), 0, ""
        try:
            async with asyncio.timeout(HANGING):
                result = await speaker.call(case)
            error = speaker.error(result, case)
            outcome, repeats = RIGHT, result.effort.retries + result.effort.hedges
            if error is not None:
                outcome = WRONG
                detail = wrong(f"relative error {error:.2e} from {[one.address for one in result.servers]}")
        except TimeoutError:
            outcome = HUNG
        except Exception as failure:
            outcome, detail = type(failure).__name__, str(failure)
        return CallRecord(speaker.name, case.layer, len(case.ids), began, self._now(), outcome, detail, repeats)


def _uses_all(speaker: Speaker, stage: Stage) -> bool:
    wanted = [place for place in stage.places if (shard_of(place) == NEXT) == (speaker.name == NEXT)]
    return sum(member.in_use for member in speaker.members) == len(wanted)
