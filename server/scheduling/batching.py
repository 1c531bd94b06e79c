"""Batching across callers: whatever waits for a layer when the device frees becomes one device batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch

from expertd.kernels.numerics.backend import Backend, TokenBatch
from expertd.proto.base.errors import DeadlineExceeded, ExpertdError, ServerFault, Unavailable
from expertd.server.scheduling.admission import Admission
from expertd.server.scheduling.device import BatchOutcome, DeviceOwner, collect, reject
from expertd.server.scheduling.queue import Completed, FairQueue, Job
from expertd.server.telemetry.metrics import Metrics

OVERLAP_TOKENS = 256
"""A batch smaller than this gains more by growing while another is under way than by overlapping with it."""


class Scheduler:
    """Queues requests within a bound on tokens and keeps the device busy. Lives on the event loop."""

    def __init__(
        self,
        backend: Backend,
        device: DeviceOwner,
        num_experts: int,
        *,
        max_batch_tokens: int,
        max_queued_tokens: int,
        max_queued_bytes: int,
        metrics: Metrics,
        on_fault: Callable[[BaseException], None] = lambda error: None,
        on_abandon: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_fault` is told what the backend raised unexpectedly.

        `on_abandon` is called before those are answered whose tensors the device may still use.
        """
        self._backend = backend
        self._device = device
        self._num_experts = num_experts
        self._max_batch_tokens = max_batch_tokens
        self._metrics = metrics
        self._on_fault = on_fault
        self._on_abandon = on_abandon
        self._queue = FairQueue()
        self._admission = Admission(self._queue, max_queued_tokens, max_queued_bytes)
        self._unanswered: set[asyncio.Future[Completed]] = set()
        self._under_way: list[int] = []
        self.closed_because: str | None = "the server is starting"
        self._refusing = True
        metrics.queue_capacity.set(max_queued_tokens)
        metrics.queue_tokens.set_function(lambda: self.queued_tokens)
        metrics.ready.set_function(lambda: self.closed_because is None)

    @property
    def queued_tokens(self) -> int:
        return self._queue.tokens

    def open(self) -> None:
        self.closed_because = None
        self._refusing = False

    def close(self, reason: str, *, refusing: bool = True) -> None:
        """Refuse new requests with `Unavailable`; those already accepted are still answered.

        Not yet `refusing`, only new callers are turned away, by `check_open`.
        """
        self.closed_because = reason
        self._refusing |= refusing

    def abandon(self, reason: str) -> None:
        """Answer everyone who waits, and refuse new requests, with `Unavailable`."""
        self.close(reason)
        self._on_abandon()
        for future in self._unanswered:
            reject(future, Unavailable(reason))

    def check_open(self) -> None:
        if self.closed_because is not None:
            raise Unavailable(self.closed_because)

    def check_room(self, tokens: int, num_bytes: int) -> None:
        """Raise `Unavailable`, or `Overloaded` when a request of this size would be refused now."""
        if self._refusing:
            self.check_open()
        self._admission.check(tokens, num_bytes)

    async def execute(
        self, caller: Hashable, layer: int, batch: TokenBatch, reply_dtype: torch.dtype, timeout: float | None
    ) -> Completed:
        """Compute `batch`, together with others that wait; `caller` is whoever is to get a fair share.

        Raises `Unavailable`, `Overloaded`, `DeadlineExceeded` (after waiting `timeout` seconds) or `ServerFault`. When
        cancelled it ends at once if the batch still waits, and otherwise once the device no longer uses its tensors.
        """
        self.check_room(batch.num_tokens, batch.num_bytes)
        now = time.perf_counter()
        expires = None if timeout is None else now + timeout
        future: asyncio.Future[Completed] = asyncio.get_running_loop().create_future()
        self._unanswered.add(future)
        future.add_done_callback(self._settled)
        job = Job(caller, layer, batch, reply_dtype, now, expires, future)
        self._queue.put(job)
        self._start_next()
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if self._queue.remove(job):
                future.cancel()
            else:
                await asyncio.wait((future,))
            raise

    def _settled(self, future: asyncio.Future[Completed]) -> None:
        self._unanswered.discard(future)
        if not future.cancelled():
            # Who waited may have been cancelled: then an error is nobody's, and asyncio is not to complain of it.
            future.exception()

    def _start_next(self) -> None:
        while self._queue and may_start(self._under_way, self._queue.tokens, self._backend.depth):
            jobs = self._keep_wanted(self._queue.take(self._max_batch_tokens))
            if jobs:
                self._start(jobs)

    def _keep_wanted(self, jobs: list[Job]) -> list[Job]:
        """Drop what was given up or waited past its time, before it costs device time."""
        now = time.perf_counter()
        for job in jobs:
            if not job.future.done() and job.expires is not None and job.expires <= now:
                waited = now - job.arrived
                job.future.set_exception(DeadlineExceeded(f"timeout_us ran out after {waited:.6f} s in the queue"))
        return [job for job in jobs if not job.future.done()]

    def _start(self, jobs: list[Job]) -> None:
        requests = [job.batch for job in jobs]
        tokens = sum(request.num_tokens for request in requests)
        # Small, and with nothing that could overlap it: not worth the waking of a second thread.
        alone = tokens < OVERLAP_TOKENS and not self._under_way and not self._queue
        self._under_way.append(tokens)
        start = partial(self._backend.submit, jobs[0].layer, requests, jobs[0].reply_dtype)
        finish = partial(collect, jobs[0].layer, requests, self._num_experts)
        outcome = self._device.run(start, finish, alone=alone)
        now = time.perf_counter()
        outcome.add_done_callback(partial(self._finish, jobs, tokens, now))
        wait = self._metrics.queue_wait.labels(jobs[0].layer)
        for job in jobs:
            wait.observe(now - job.arrived)

    def _finish(self, jobs: list[Job], tokens: int, started: float, outcome: asyncio.Future[BatchOutcome]) -> None:
        self._under_way.remove(tokens)
        error = outcome.exception()
        now = time.perf_counter()
        if error is None:
            self._admission.computed(tokens, now - started)
            self._metrics.batch_tokens.observe(tokens)
            self._metrics.device_busy.inc(outcome.result().seconds.compute)
        elif not isinstance(error, ExpertdError):
            self._on_fault(error)
        for position, job in enumerate(jobs):
            if job.future.done():
                continue
            if error is not None:
                job.future.set_exception(_as_fault(error))
            else:
                result = outcome.result()
                job.future.set_result(
                    Completed(
                        partials=result.partials[position],
                        waited=now - job.arrived - sum(result.seconds),
                        seconds=result.seconds,
                    )
                )
        self._start_next()


def may_start(under_way: Sequence[int], waiting_tokens: int, depth: int) -> bool:
    """Whether the next batch starts now, with batches of these tokens under way and so many tokens waiting.

    Two small batches never overlap: the second waits and grows, which costs the device less than both.
    """
    if not under_way:
        return True
    overlaps = min(under_way) >= OVERLAP_TOKENS or waiting_tokens >= OVERLAP_TOKENS
    return len(under_way) < depth and overlaps


def _as_fault(error: BaseException) -> ExpertdError:
    """What one of those who wait is told."""
    if isinstance(error, ExpertdError):
        return error.again()
    return ServerFault(f"the device failed: {type(error).__name__}: {error}")
