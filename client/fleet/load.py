"""What a server computed lately for one coordinator, by layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

HALF_LIFE = 60.0
"""Seconds after which a pair counts half: as in the loads that servers tell."""


class Load:
    """(token, expert) pairs that were answered, old ones counting less. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pairs: dict[int, tuple[float, float]] = {}
        """By layer; as of when."""

    def add(self, layer: int, pairs: int) -> None:
        now = self._clock()
        self._pairs[layer] = self._aged(layer, now) + pairs, now

    def lately(self, layer: int) -> float:
        """Pairs of the last minutes."""
        return self._aged(layer, self._clock())

    def _aged(self, layer: int, now: float) -> float:
        pairs, then = self._pairs.get(layer, (0.0, now))
        return pairs * math.exp2((then - now) / HALF_LIFE)
