"""How many attempts may be repeated: a share of all, so that repeating does not multiply the load of trouble."""

from __future__ import annotations


class RetryBudget:
    """A bucket of attempts: every first attempt adds `ratio` of one, up to `burst`; every repeated one takes one."""

    def __init__(self, ratio: float, burst: int) -> None:
        self._ratio = ratio
        self._burst = burst
        self._left = float(burst)

    def earn(self, attempts: int) -> None:
        self._left = min(self._left + self._ratio * attempts, self._burst)

    def take(self) -> bool:
        """Whether another attempt may be made; it is then counted."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
