"""The order in which waiting requests reach the device: merged by layer, shared fairly between callers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from expertd.kernels.backend import Partials, TokenBatch


@dataclass(frozen=True, slots=True)
class Completed:
    """One request's result, with its seconds by stage."""

    partials: Partials
    queue: float
    """Waiting for the device, and between its stages."""
    copy_in: float
    compute: float
    copy_out: float


Kind: TypeAlias = tuple[int, torch.dtype, int, torch.dtype]
"""Layer, dtype of the hidden states, slots a token, dtype of the reply: requests of one kind can share a batch."""


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
        self._waiting: dict[Hashable, dict[Kind, deque[Job]]] = {}
        self.tokens = 0
        self.num_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, job: Job) -> None:
        self._waiting.setdefault(job.caller, {}).setdefault(job.kind, deque()).append(job)
        self.tokens += job.batch.num_tokens
        self.num_bytes += job.batch.num_bytes

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
                if taken and jobs[0].batch.num_tokens > room:
                    sharing.remove(name)
                    continue
                taken.append(jobs.popleft())
                room -= taken[-1].batch.num_tokens
                if not jobs:
                    sharing.remove(name)
                    self._forget(name, kind)
        if caller in self._waiting:
            self._waiting[caller] = self._waiting.pop(caller)
        self.tokens -= max_tokens - room
        self.num_bytes -= sum(job.batch.num_bytes for job in taken)
        return taken

    def _forget(self, caller: Hashable, kind: Kind) -> None:
        del self._waiting[caller][kind]
        if not self._waiting[caller]:
            del self._waiting[caller]
