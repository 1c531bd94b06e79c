"""The order in which waiting requests reach the device, as the engine's is compared with it."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias, TypeVar

import torch

from expertd.kernels.numerics.backend import TokenBatch

T = TypeVar("T")
Kind: TypeAlias = tuple[int, torch.dtype, int, torch.dtype]
"""Layer, dtype of the hidden states, top_k, dtype of the reply: requests of one kind can share a batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A request waiting for the device."""

    caller: Hashable
    layer: int
    batch: TokenBatch
    reply_dtype: torch.dtype
    arrived: float
    expires: float | None
    identity: Hashable = ""
    """Who has the connection `caller`."""

    @property
    def kind(self) -> Kind:
        return (self.layer, self.batch.hidden.dtype, self.batch.expert_ids.shape[1], self.reply_dtype)


Line: TypeAlias = dict[Kind, OrderedDict[Job, int]]
"""What one connection has waiting, each job with its number in the order in which all came. Ordered dictionaries are
queues from whose middle a job leaves as quickly as from their ends."""


class FairQueue:
    """Waiting jobs, first come first served for each caller; identities take turns, and so do the callers of each.

    A caller with a thousand waiting jobs delays another one's single job by one batch, not by a thousand jobs.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, dict[Hashable, Line]] = {}
        self._numbers = itertools.count()
        self.tokens = 0
        self.num_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __contains__(self, job: Job) -> bool:
        return job in self._waiting.get(job.identity, {}).get(job.caller, {}).get(job.kind, {})

    def put(self, job: Job) -> None:
        line = self._waiting.setdefault(job.identity, {}).setdefault(job.caller, {})
        line.setdefault(job.kind, OrderedDict())[job] = next(self._numbers)
        self._count(job, 1)

    def remove(self, job: Job) -> bool:
        """Take out a job that still waits; whether it did."""
        if job not in self:
            return False
        share = self._waiting[job.identity]
        line = share[job.caller]
        jobs = line[job.kind]
        del jobs[job]
        self._count(job, -1)
        if not jobs:
            del line[job.kind]
        if not line:
            del share[job.caller]
        if not share:
            del self._waiting[job.identity]
        return True

    def take(self, max_tokens: int) -> list[Job]:
        """Remove a batch: the job that waits longest of the caller whose turn it is, of the identity whose turn it is,
        and from all identities in turn, of each from all callers in turn, what else there is of its kind, as far as it
        fits in `max_tokens`. Empty only when nothing waits."""
        if not self._waiting:
            return []
        identity, share = next(iter(self._waiting.items()))
        caller, line = next(iter(share.items()))
        kind = min(line, key=lambda kind: next(iter(line[kind].values())))
        sharing = [deque(line[kind] for line in share.values() if kind in line) for share in self._waiting.values()]
        taken: list[Job] = []
        room = max_tokens
        while any(sharing):
            for lots in sharing:
                job = _next_of(lots, room if taken else None)
                if job is not None:
                    taken.append(job)
                    room -= job.batch.num_tokens
                    self.remove(job)
        _to_the_end(self._waiting, identity)
        _to_the_end(self._waiting.get(identity, {}), caller)
        return taken

    def _count(self, job: Job, sign: int) -> None:
        self.tokens += sign * job.batch.num_tokens
        self.num_bytes += sign * job.batch.num_bytes


def _next_of(lots: deque[OrderedDict[Job, int]], room: int | None) -> Job | None:
    """The next job of an identity's callers, who take turns, of at most `room` tokens."""
    while lots:
        jobs = lots.popleft()
        job = next(iter(jobs))
        if room is None or job.batch.num_tokens <= room:
            if len(jobs) > 1:
                lots.append(jobs)
            return job
    return None


def _to_the_end(turns: dict[Hashable, T], name: Hashable) -> None:
    if name in turns:
        turns[name] = turns.pop(name)


SMALL_TOKENS = 256
"""A batch smaller than this gains more by growing while another is under way than by overlapping with it."""


def may_start(under_way: Sequence[int], waiting_tokens: int, depth: int) -> bool:
    """Whether the next batch starts now, with batches of these tokens under way and so many tokens waiting.

    Two small batches never overlap: the second waits and grows, which costs the device less than both.
    """
    if not under_way:
        return True
    overlaps = min(under_way) >= SMALL_TOKENS or waiting_tokens >= SMALL_TOKENS
    return len(under_way) < depth and overlaps


class Queues:
    """All that waits: where an executor has a place for small batches, small jobs apart from the others."""

    def __init__(self, *, express: bool) -> None:
        self.large, self.small = FairQueue(), FairQueue()
        self._express = express

    def __contains__(self, job: Job) -> bool:
        return job in self._of(job)

    @property
    def tokens(self) -> int:
        return self.large.tokens + self.small.tokens

    @property
    def num_bytes(self) -> int:
        return self.large.num_bytes + self.small.num_bytes

    def put(self, job: Job) -> None:
        self._of(job).put(job)

    def remove(self, job: Job) -> bool:
        return self._of(job).remove(job)

    def take(self, what: Next, max_tokens: int) -> list[Job]:
        if what is Next.LARGE:
            return self.large.take(max_tokens)
        return self.small.take(min(max_tokens, SMALL_TOKENS - 1) if what is Next.EXPRESS else max_tokens)

    def _of(self, job: Job) -> FairQueue:
        return self.small if self._express and job.batch.num_tokens < SMALL_TOKENS else self.large


class Next(Enum):
    """Which waiting requests become a batch."""

    LARGE = auto()
    SMALL = auto()
    EXPRESS = auto()
    """Small ones, into the place that an executor has for them."""


def next_batch(under_way: Sequence[int], express_is_free: bool, large: int, small: int, depth: int) -> Next | None:
    """What starts now, where `small` tokens wait apart from `large` ones.

    `under_way`: tokens of the batches outside the place for small ones. These need not wait for large ones, which in
    turn do not give way to many of them.
    """
    place, many = len(under_way) < depth, small >= SMALL_TOKENS
    if small and express_is_free and not (many and place):
        return Next.EXPRESS
    if large and may_start(under_way, large, depth):
        return Next.LARGE
    return Next.SMALL if many and place else None
