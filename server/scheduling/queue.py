"""The order in which waiting requests reach the device: merged by layer, shared fairly between callers."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from expertd.kernels.numerics.backend import DeviceSeconds, Partials, TokenBatch


@dataclass(frozen=True, slots=True)
class Completed:
    """One request's result."""

    partials: Partials
    waited: float
    """Seconds in which nothing was done for it: its time in the queue, and between the stages of its batch."""
    seconds: DeviceSeconds
    """Of its whole batch."""


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
    future: asyncio.Future[Completed]

    @property
    def kind(self) -> Kind:
        return (self.layer, self.batch.hidden.dtype, self.batch.expert_ids.shape[1], self.reply_dtype)


class FairQueue:
    """Waiting jobs, first come first served for each caller, callers taking turns.

    A caller with a thousand waiting jobs delays another one's single job by one batch, not by a thousand jobs.
    """

    def __init__(self) -> None:
        # Ordered dictionaries are queues from whose middle a job leaves as quickly as from their ends.
        self._waiting: dict[Hashable, dict[Kind, OrderedDict[Job, None]]] = {}
        self.tokens = 0
        self.num_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, job: Job) -> None:
        self._waiting.setdefault(job.caller, {}).setdefault(job.kind, OrderedDict())[job] = None
        self._count(job, 1)

    def remove(self, job: Job) -> bool:
        """Take out a job that still waits; whether it did."""
        jobs = self._waiting.get(job.caller, {}).get(job.kind)
        if jobs is None or job not in jobs:
            return False
        del jobs[job]
        if not jobs:
            self._forget(job.caller, job.kind)
        self._count(job, -1)
        return True

    def take(self, max_tokens: int) -> list[Job]:
        """Remove a batch: the job that waits longest of the caller whose turn it is, and from all callers in turn
        what else there is of its kind, as far as it fits in `max_tokens`. Empty only when nothing waits."""
        if not self._waiting:
            return []
        caller, kinds = next(iter(self._waiting.items()))
        kind = next(iter(kinds))
        taken: list[Job] = []
        room = max_tokens
        sharing = [name for name, waiting in self._waiting.items() if kind in waiting]
        while sharing:
            for name in tuple(sharing):
                jobs = self._waiting[name][kind]
                job = next(iter(jobs))
                if taken and job.batch.num_tokens > room:
                    sharing.remove(name)
                    continue
                del jobs[job]
                taken.append(job)
                room -= job.batch.num_tokens
                self._count(job, -1)
                if not jobs:
                    sharing.remove(name)
                    self._forget(name, kind)
        if caller in self._waiting:
            self._waiting[caller] = self._waiting.pop(caller)
        return taken

    def _count(self, job: Job, sign: int) -> None:
        self.tokens += sign * job.batch.num_tokens
        self.num_bytes += sign * job.batch.num_bytes

    def _forget(self, caller: Hashable, kind: Kind) -> None:
        del self._waiting[caller][kind]
        if not self._waiting[caller]:
            del self._waiting[caller]
