"""How fast servers answer, compared with each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

NEWEST_SHARE = 0.2
"""Of the newest answer in a moving average."""
FEWEST = 4
"""Answers of one size before they tell anything."""
FORGOTTEN_SECONDS = 10.0
"""Without an answer of a size, after which what was known of it counts no more."""
OUTLIER, LEAST_SECONDS = 3.0, 0.02
"""A server is an outlier when it takes so many times as long as the fastest, and so much longer."""


class Average(NamedTuple):
    """Of calls with about as many tokens."""

    seconds: float
    answers: int
    newest: float
    """On the monotonic clock."""


class Latency:
    """Moving averages of one server, by the tokens of a call to the next power of two. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._averages: dict[int, Average] = {}

    def answered(self, tokens: int, seconds: float) -> None:
        size, now = tokens.bit_length(), self._clock()
        known = self._averages.get(size)
        if known is None or now - known.newest > FORGOTTEN_SECONDS:
            self._averages[size] = Average(seconds, 1, now)
            return
        average = known.seconds + NEWEST_SHARE * (seconds - known.seconds)
        self._averages[size] = Average(average, known.answers + 1, now)

    def forget(self) -> None:
        self._averages = {}

    def known(self, now: float) -> dict[int, float]:
        """Seconds by size, as far as they tell anything."""
        return {
            size: average.seconds
            for size, average in self._averages.copy().items()
            if average.answers >= FEWEST and now - average.newest <= FORGOTTEN_SECONDS
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
