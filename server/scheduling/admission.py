"""How much may wait for the device, and when to come back to a server that is full."""

from __future__ import annotations

from expertd.proto.base.errors import Overloaded
from expertd.server.scheduling.queue import FairQueue

LONGEST_DELAY = 5.0
"""Seconds; a server that is this far behind is better judged again then than trusted with a longer estimate."""
SHORTEST_DELAY = 0.001
NEWEST_SHARE = 0.1
"""Of the newest batch in the moving average of the device's rate."""


class Admission:
    """Bounds on what waits in `queue`: tokens, and bytes of tensors."""

    def __init__(self, queue: FairQueue, max_tokens: int, max_bytes: int) -> None:
        self._queue = queue
        self._max_tokens = max_tokens
        self._max_bytes = max_bytes
        self._tokens_per_second = 0.0

    def computed(self, tokens: int, seconds: float) -> None:
        """Tell that the device took `seconds` for a batch of `tokens`."""
        rate = tokens / max(seconds, 1e-6)
        self._tokens_per_second += (rate - self._tokens_per_second) * (NEWEST_SHARE if self._tokens_per_second else 1.0)

    def check(self, tokens: int, num_bytes: int) -> None:
        """Raise `Overloaded` unless a request of `tokens` and `num_bytes` may wait beside what already does."""
        if self._queue.tokens + tokens > self._max_tokens:
            raise Overloaded(
                f"{self._queue.tokens} tokens are queued and num_tokens is {tokens}; "
                f"at most {self._max_tokens} may wait: retry later or use another replica",
                retry_after=self._delay(tokens, self._max_tokens),
            )
        if self._queue.num_bytes + num_bytes > self._max_bytes:
            raise Overloaded(
                f"{self._queue.num_bytes} bytes are queued and the request's tensors have {num_bytes}; "
                f"at most {self._max_bytes} may wait: retry later or use another replica",
                retry_after=self._delay(tokens, self._queue.tokens),
            )

    def _delay(self, tokens: int, room: int) -> float | None:
        """Seconds until `tokens` fit into `room`, half of the queue being gone: a full queue soon fills up again."""
        if not self._tokens_per_second:
            return None
        ahead = max(self._queue.tokens + tokens - room, self._queue.tokens // 2)
        return min(max(ahead / self._tokens_per_second, SHORTEST_DELAY), LONGEST_DELAY)
