"""What happened: every call and every fault, with their times, and whether it was allowed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.chaos.composed.schedule import NEXT, shard_of
from tests.chaos.scale import scaled

RIGHT, WRONG, HUNG = "right", "wrong", "hung"
ALLOWED = frozenset({"Unavailable", "DeadlineExceeded", "Overloaded", "ServerFault", "StalePlacement"})
"""Errors of calls while experts have no sound owner."""
RECOVERY = scaled(4.0, 10.0)
"""Seconds from the end of a fault until its victim counts as sound again: found, asked, used. The short version runs on
machines that do other things, too."""
LONGEST_CALL = 10.0
"""Seconds, whatever happens; `schedule` has no fault that lasts longer."""
MOST_REPEATS = 8
"""Of one call that was answered."""
REPEATS, REPEATS_A_CALL, REPEATS_A_FAULT = 32, 0.3, 32
"""Of one coordinator in all; some failpoints have every fifth answer of their server fail for as long as it lives."""
LONGEST_SETTLING = 30.0
FEWEST_SETTLED = 5
"""Calls of each coordinator after everything has been mended."""


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call; times are seconds since the beginning."""

    coordinator: str
    layer: int
    tokens: int
    began: float
    ended: float
    outcome: str
    """`RIGHT`, `WRONG`, `HUNG` or the kind of the error."""
    detail: str = ""
    repeats: int = 0
    """Retries and hedges, where it was answered."""


@dataclass(slots=True)
class FaultRecord:
    """One fault, as it was done."""

    kind: str
    victim: str
    places: tuple[str, ...]
    """Whose servers it harms."""
    began: float
    ended: float | None = None


@dataclass(slots=True)
class History:
    """All of one seed."""

    seed: int
    places: tuple[str, ...]
    calls: list[CallRecord] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)
    repeats: dict[str, float] = field(default_factory=dict)
    """In all, by coordinator, calls that failed included."""
    mended: float | None = None
    """When the last fault had ended and every server was there again."""
    settled: float | None = None
    """When every coordinator used every server of its model again; None: never."""

    def write(self, path: Path) -> None:
        """One JSON object a line: faults and calls in the order of their beginning, then the rest."""
        happened: list[FaultRecord | CallRecord] = [*self.faults, *self.calls]
        entries = [asdict(entry) for entry in sorted(happened, key=lambda entry: entry.began)]
        rest = {"seed": self.seed, "repeats": self.repeats, "mended": self.mended, "settled": self.settled}
        path.write_text("".join(f"{json.dumps(line)}\n" for line in [*entries, rest]))

    def violations(self) -> list[str]:
        """What was not allowed."""
        return [*self._wrong(), *self._failed(), *self._slow(), *self._repeated(), *self._unhealthy()]

    def _wrong(self) -> Iterable[str]:
        for call in self.calls:
            if call.outcome not in {RIGHT, *ALLOWED}:
                yield f"{_name(call)}: {call.outcome}: {call.detail}"

    def _failed(self) -> Iterable[str]:
        """Errors of calls for which a sound replica of every shard was there all the while."""
        for call in self.calls:
            if call.outcome in ALLOWED and self._had_owners(call):
                yield f"{_name(call)}: every expert had a sound owner: {call.outcome}: {call.detail}"

    def _slow(self) -> Iterable[str]:
        for call in self.calls:
            if call.ended - call.began > LONGEST_CALL:
                yield f"{_name(call)}: it took {call.ended - call.began:.1f} s"

    def _repeated(self) -> Iterable[str]:
        for call in self.calls:
            if call.repeats > MOST_REPEATS:
                yield f"{_name(call)}: {call.repeats} repeats"
        made = Counter(call.coordinator for call in self.calls)
        for name, repeats in self.repeats.items():
            most = REPEATS + REPEATS_A_CALL * made[name] + REPEATS_A_FAULT * len(self.faults)
            if repeats > most:
                yield f"{name}: {repeats:.0f} repeats in {made[name]} calls, more than {most:.0f}"

    def _unhealthy(self) -> Iterable[str]:
        if self.mended is None or self.settled is None or self.settled - self.mended > LONGEST_SETTLING:
            yield f"not all servers are used {LONGEST_SETTLING} s after everything was mended"
            return
        late = [call for call in self.calls if call.began > self.settled]
        for call in late:
            if call.outcome != RIGHT:
                yield f"{_name(call)}, after everything was mended: {call.outcome}: {call.detail}"
        right = Counter(call.coordinator for call in late if call.outcome == RIGHT)
        for name in self.repeats:
            if right[name] < FEWEST_SETTLED:
                yield f"{name}: {right[name]} right answers after everything was mended"

    def _had_owners(self, call: CallRecord) -> bool:
        sound = {shard_of(place) for place in self.places if not self._harmed(place, call)}
        return sound >= ({NEXT} if call.coordinator == NEXT else {shard_of(place) for place in self.places} - {NEXT})

    def _harmed(self, place: str, call: CallRecord) -> bool:
        return any(
            place in fault.places
            and fault.began <= call.ended
            and (fault.ended is None or call.began <= fault.ended + RECOVERY)
            for fault in self.faults
        )


def _name(call: CallRecord) -> str:
    return f"{call.coordinator} at {call.began:.2f} s, layer {call.layer}, {call.tokens} tokens"
