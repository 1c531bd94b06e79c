"""How much may wait, as the engine's bounds are compared with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from expertd.proto.base.errors import Overloaded
from tests.support.model.queue import Job, Queues

LONGEST_DELAY = 5.0
"""Seconds; a server that is this far behind is better judged again then than trusted with a longer estimate."""
SHORTEST_DELAY = 0.001
NEWEST_SHARE = 0.1
"""Of the newest batch in the moving average of the device's rate."""


class Admission:
    """Bounds on what waits in `queue`: tokens, and bytes of tensors. Who has most of what is short gives way."""

    def __init__(self, queue: Queues, max_tokens: int, max_bytes: int) -> None:
        self._queue = queue
        self._bounds = {"tokens": max_tokens, "bytes": max_bytes}
        self._newest_last: list[Job] = []
        self._rates = {False: 0.0, True: 0.0}
        """Tokens per second, of express batches and of others."""

    def computed(self, tokens: int, seconds: float, *, express: bool) -> None:
        """Tell that the device took `seconds` for a batch of `tokens`."""
        rate, average = tokens / max(seconds, 1e-6), self._rates[express]
        self._rates[express] += (rate - average) * (NEWEST_SHARE if average else 1.0)

    def put(self, job: Job) -> list[tuple[Job, Overloaded]]:
        """Let `job` wait, and return those that left for it, with what they are told. Raises `Overloaded`."""
        more = {"tokens": job.batch.num_tokens, "bytes": job.batch.num_bytes}
        waiting = list(self._waiting())
        leaving: list[tuple[Job, str]] = []
        while bound := next((what for what in more if _of(waiting, what) + more[what] > self._bounds[what]), None):
            held = {name: _of(waiting, bound, name) for name in sorted({str(one.identity) for one in waiting})}
            most = max(held, key=lambda name: held[name], default="")
            if not held or held[most] <= held.get(str(job.identity), 0) + more[bound]:
                raise self._full(bound, more)
            newest = next(one for one in reversed(waiting) if one.identity == most)
            waiting.remove(newest)
            leaving.append((newest, self._words(bound, held[most])))
        for one, _ in leaving:
            self._queue.remove(one)
        self._queue.put(job)
        self._newest_last = [*waiting, job]
        room = self._bounds["tokens"]
        return [(one, Overloaded(words, retry_after=self._delay(one.batch.num_tokens, room))) for one, words in leaving]

    def _waiting(self) -> Iterator[Job]:
        """Oldest first, those that are still in the queue."""
        return (one for one in self._newest_last if one in self._queue)

    def _full(self, bound: str, more: dict[str, int]) -> Overloaded:
        queued = {"tokens": self._queue.tokens, "bytes": self._queue.num_bytes}[bound]
        field = {"tokens": "num_tokens is", "bytes": "the request's tensors have"}[bound]
        room = self._bounds["tokens"] if bound == "tokens" else self._queue.tokens
        return Overloaded(
            f"{queued} {bound} are queued and {field} {more[bound]}; "
            f"at most {self._bounds[bound]} may wait: retry later or use another replica",
            retry_after=self._delay(more["tokens"], room),
        )

    def _words(self, bound: str, held: int) -> str:
        return (
            f"the request left the queue for another caller's: at most {self._bounds[bound]} {bound} may wait, and"
            f" {held} were this caller's, more than anybody's: retry later or use another replica"
        )

    def _delay(self, tokens: int, room: int) -> float | None:
        """Seconds until `tokens` fit into `room`, half of the queue being gone: a full queue soon fills up again."""
        # Express batches are of few tokens, and beside others: they tell the rate only while nothing else does.
        rate = self._rates[False] or self._rates[True]
        if not rate:
            return None
        ahead = max(self._queue.tokens + tokens - room, self._queue.tokens // 2)
        return min(max(ahead / rate, SHORTEST_DELAY), LONGEST_DELAY)


def _of(jobs: Sequence[Job], what: str, identity: str | None = None) -> int:
    """The tokens or bytes of `jobs`, or of those of one identity."""
    mine = (one.batch for one in jobs if identity in (None, one.identity))
    return sum(batch.num_tokens if what == "tokens" else batch.num_bytes for batch in mine)
