"""How fast servers answer, compared with each other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

MEMORY_SECONDS = 1.0
"""After which an answer counts 1/e of what it did."""
LEAST_KEPT = 0.8
"""Of earlier answers when the next one comes, however late that is."""
FEWEST = 4
"""Answers of one size before they tell anything."""
FORGOTTEN_SECONDS = 10.0
"""Without an answer of a size, after which what was known of it counts no more."""
OUTLIER, LEAST_SECONDS = 3.0, 0.02
"""A server is an outlier when it takes so many times as long as the fastest, and so much longer."""


class Waits(NamedTuple):
    """Of calls with about as many tokens; the sums count newer answers more."""

    seconds: float
    squares: float
    answers: int
    newest: float
    """On the monotonic clock."""

    @property
    def expected(self) -> float:
        """Seconds of the call that a look at a random moment finds under way: the mean weighted by length (the
        inspection paradox). A server that stands still now and then answers nothing meanwhile; by number, the answers
        before and after would hide it."""
        return self.squares / self.seconds if self.seconds else 0.0


class Latency:
    """What callers wait for one server, by the tokens of a call to the next power of two. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waits: dict[int, Waits] = {}

    def answered(self, tokens: int, seconds: float) -> None:
        size, now = tokens.bit_length(), self._clock()
        known = self._waits.get(size)
        if known is None or now - known.newest > FORGOTTEN_SECONDS:
            known = Waits(0.0, 0.0, 0, now)
        kept = max(math.exp((known.newest - now) / MEMORY_SECONDS), LEAST_KEPT)
        self._waits[size] = Waits(
            kept * known.seconds + seconds, kept * known.squares + seconds * seconds, known.answers + 1, now
        )

    def forget(self) -> None:
        self._waits = {}

    def known(self, now: float) -> dict[int, float]:
        """Seconds by size, as far as they tell anything."""
        return {
            size: waits.expected
            for size, waits in self._waits.copy().items()
            if waits.answers >= FEWEST and now - waits.newest <= FORGOTTEN_SECONDS
        }


class Slowness(NamedTuple):
    """What a server takes beyond the fastest."""

    ratio: float
    """At least 1: in the size in which it is the worst."""
    seconds: float

    @property
    def is_outlier(self) -> bool:
        return self.ratio > OUTLIER and self.seconds > LEAST_SECONDS


AS_FAST = Slowness(1.0, 0.0)


def compare(known: Mapping[int, Mapping[int, float]]) -> dict[int, Slowness]:
    """Slowness by server, of seconds by size of each; only sizes of which several servers know tell anything."""
    sizes = {size for seconds in known.values() for size in seconds}
    found = dict.fromkeys(known, AS_FAST)
    for size in sizes:
        here = {number: seconds[size] for number, seconds in known.items() if size in seconds}
        fastest = min(here.values())
        for number, seconds in here.items():
            found[number] = max(found[number], Slowness(seconds / fastest, seconds - fastest))
    return found
