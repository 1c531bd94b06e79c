"""When an answer is so late that asking another server as well is worth it."""

from __future__ import annotations

from collections import deque

from expertd.client.base.quantiles import quantile

WINDOW = 512
"""Newest answers that count."""
FEWEST = 64
"""Answers before which nothing is known."""
REFRESH = 32
"""Answers after which the quantile is taken again."""


class Lateness:
    """The time within which a `share` of the newest answers came."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._since_refresh = 0
        self.limit: float | None = None
        """Seconds after which an answer is late; None while too few are known."""

    def answered(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self._since_refresh += 1
        if len(self._seconds) >= FEWEST and self._since_refresh >= REFRESH:
            self._since_refresh = 0
            self.limit = quantile(self._seconds, self._share)
