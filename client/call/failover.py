"""One call of a layer: its parts sent at once, and what fails sent again to other owners.

A call is a pure function of its request, so repeating it is always right; an answer that comes after its attempt was
given up is never looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from expertd.client.call.activations import Activations
from expertd.client.call.caller import Caller, Superseded
from expertd.client.call.dispatch import Dispatch, Work, check_receipt, leave_out, plan_dispatch
from expertd.client.call.result import Answer, Effort
from expertd.client.call.straight import Outcome, Part
from expertd.client.fleet.member import LOST, Member
from expertd.client.telemetry.tracing import attempt_span
from expertd.proto.base.errors import DeadlineExceeded, ExpertdError, Overloaded, StalePlacement, Unavailable
from expertd.proto.codec import ExecuteCall, ExecuteResult

T = TypeVar("T")
BACKOFF_SECONDS = 0.025
"""Before the second attempt; doubled before every further one, with up to half of it taken off or added."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Who failed, and how."""

    member: Member
    error: ExpertdError


class LayerCall:
    """One call of `layer`."""

    def __init__(self, caller: Caller, fingerprint: str, layer: int, activations: Activations, deadline: float) -> None:
        """All of it is computed with the weights that have this `fingerprint`; `deadline` is on the monotonic clock."""
        self._caller = caller
        self._membership = caller.membership
        self._config = caller.config
        self._fingerprint = fingerprint
        self._layer = layer
        self._activations = activations
        self._deadline = deadline
        self.effort = Effort()
        self.missing: list[Work] = []
        """What nobody computed, where the caller allows that."""

    async def run(self, ids: Tensor, weights: Tensor) -> list[Answer]:
        """Compute all pairs of [T, k] ids and weights, each exactly once; the answers in a fixed order.

        Raises the last error of a part whose attempts or time ran out, unless what is missing may be left out, and
        `Superseded` where its weights are gone.
        """
        try:
            return await self._place(Work(torch.arange(len(ids), device="cpu"), ids, weights), attempt=1)
        finally:
            self._config.metrics.spent(self.effort.retries, self.effort.failovers, self.effort.hedges)

    async def mend(self, outcomes: Sequence[tuple[Part, Outcome]]) -> list[Answer]:
        """What became of the parts of a first attempt, with what failed computed again; otherwise like `run`."""

        async def mended(part: Part, outcome: Outcome) -> list[Answer]:
            if isinstance(outcome, Answer):
                return [outcome]
            return await (self._send(*part, 1) if outcome is None else self._again(*part, outcome, 1))

        try:
            answers = await _all_or_error([mended(*outcome) for outcome in outcomes])
        finally:
            self._config.metrics.spent(self.effort.retries, self.effort.failovers, self.effort.hedges)
        return list(itertools.chain.from_iterable(answers))

    async def _place(self, work: Work, attempt: int, failed: Failure | None = None) -> list[Answer]:
        """Send `work` to owners of its experts, waiting a little for owners that are out of use.

        After a failure, the member that failed is asked again only when nobody else owns the experts.
        """
        if attempt > 1:
            await asyncio.sleep(BACKOFF_SECONDS * 2 ** (attempt - 2) * random.uniform(0.5, 1.5))
        while True:
            chosen = self._caller.choose(
                self._fingerprint, self._layer, len(work.tokens), failed.member if failed else None
            )
            try:
                parts = self._parts(work, chosen)
            except Unavailable as nobody:
                if not self._membership.holdings.is_called(self._fingerprint):
                    raise Superseded(self._fingerprint) from None
                patience = min(self._config.owner_timeout, self._deadline - time.monotonic())
                if await self._membership.wait_for_change(patience):
                    continue
                if self._config.on_missing == "renormalize":
                    work, missing = leave_out(work, chosen)
                    self.missing.append(missing)
                    continue
                raise Unavailable(f"layer {self._layer}: {nobody}{self._membership.out_of_use()}") from None
            if failed:
                self.effort.retries += 1
                self.effort.failovers += any(member is not failed.member for member, _ in parts)
            return await self._send_all(parts, attempt)

    def _parts(self, work: Work, chosen: Tensor) -> list[Part]:
        """`work` by server, in messages of bounded size. Raises `Unavailable` for experts that nobody computes now."""
        parts: list[Part] = []
        for planned in plan_dispatch(work.expert_ids, work.weights, chosen):
            member = self._membership.members[planned.server]
            dispatch = replace(planned, tokens=work.tokens[planned.tokens])
            chunk = self._caller.chunk_tokens(member, self._activations.width)
            parts.extend((member, piece) for piece in dispatch.split(chunk))
        return parts

    async def _send_all(self, parts: Sequence[Part], attempt: int) -> list[Answer]:
        if attempt == 1:
            self._caller.budget.earn(len(parts))
            self._config.metrics.fan_out(len({member.number for member, _ in parts}))
        # Counted before anything is awaited, so that calls which start together see each other.
        self._count(parts, 1)
        try:
            answers = await _all_or_error([self._send(*part, attempt) for part in parts])
        finally:
            self._count(parts, -1)
        return list(itertools.chain.from_iterable(answers))

    async def _send(self, member: Member, dispatch: Dispatch, attempt: int) -> list[Answer]:
        try:
            return await self._attempt_or_hedge(member, dispatch)
        except ExpertdError as error:
            failure = error
        return await self._again(member, dispatch, failure, attempt)

    async def _again(self, member: Member, dispatch: Dispatch, error: ExpertdError, attempt: int) -> list[Answer]:
        """Compute what failed on `member` elsewhere, or there again. Raises `error` where that is no use."""
        # That the caller's time is up says nothing about the server.
        if not isinstance(error, (*LOST, Overloaded)) or time.monotonic() >= self._deadline:
            raise error
        failed = Failure(member, error)
        self._membership.report(member, error)
        if attempt < self._config.max_attempts and self._caller.budget.take():
            # Who owns others by now has failed nobody.
            further = 0 if isinstance(error, StalePlacement) else 1
            return await self._place(dispatch, max(2, attempt + further), failed)
        if self._config.on_missing == "renormalize":
            self.missing.append(dispatch)
            return []
        raise error

    async def _attempt_or_hedge(self, member: Member, dispatch: Dispatch) -> list[Answer]:
        """The answer of `member`; where it is late and others own the experts too, theirs if that comes first."""
        lateness = self._caller.lateness
        if lateness is None or lateness.limit is None:
            return [await self._attempt(member, dispatch)]
        first = asyncio.ensure_future(_all_or_error([self._attempt(member, dispatch)]))
        attempts, started = {first}, [first]
        try:
            await asyncio.wait(attempts, timeout=lateness.limit)
            if not first.done() and (others := self._others(member, dispatch)) and self._caller.budget.take():
                self.effort.hedges += 1
                started.append(asyncio.ensure_future(self._hedge(others)))
                attempts.add(started[-1])
            while attempts:
                done, attempts = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    error = attempt.exception()
                    if error is None:
                        return attempt.result()
                    if attempt is first and isinstance(error, ExpertdError):
                        self._membership.report(member, error)
            # Both failed: the first one's error is the one that its server is judged by.
            return first.result()
        finally:
            for attempt in started:
                attempt.add_done_callback(_ignore)
                attempt.cancel()

    async def _hedge(self, others: Sequence[Part]) -> list[Answer]:
        self._count(others, 1)
        try:
            return await _all_or_error([self._attempt(*part) for part in others])
        finally:
            self._count(others, -1)

    def _others(self, member: Member, dispatch: Dispatch) -> list[Part]:
        """How servers beside `member` would compute `dispatch`; empty when they cannot."""
        try:
            parts = self._parts(
                dispatch, self._caller.choose(self._fingerprint, self._layer, len(dispatch.tokens), member)
            )
        except (Unavailable, Superseded):
            return []
        return [] if any(other is member for other, _ in parts) else parts

    async def _attempt(self, member: Member, dispatch: Dispatch) -> Answer:
        address, shard = member.transport.address, member.shard
        await self._let_recover(member)
        timeout = min(self._config.attempt_timeout, self._deadline - time.monotonic())
        if shard is None or not member.in_use:
            raise Unavailable(f"{address}: out of use since another call failed")
        if timeout <= 0:
            raise DeadlineExceeded(f"{address}: not answered within call_timeout {self._config.call_timeout} s")
        hidden, scales = await self._activations.take(dispatch.tokens)
        with attempt_span(self._config.tracer, address, len(dispatch.tokens)) as traceparent:
            call = ExecuteCall(
                request_id=next(self._caller.request_ids),
                model_fingerprint=self._fingerprint,
                placement_epoch=shard.placement_epoch,
                layer=self._layer,
                hidden=hidden,
                scales=scales,
                expert_ids=dispatch.expert_ids,
                weights=dispatch.weights,
                reply_dtype=self._config.reply_dtype,
                timeout=timeout,
                traceparent=traceparent,
            )
            with self._counted(member, hidden.device, traceparent) as started:
                result = await _unless_silent(member, call)
                seconds = time.perf_counter() - started
                check_receipt(dispatch, result.receipt, address)
        member.answered(self._layer, len(dispatch.tokens), sum(result.receipt.values()), seconds)
        if self._caller.lateness is not None:
            self._caller.lateness.answered(seconds)
        return Answer(dispatch, result, address, seconds)

    @contextlib.contextmanager
    def _counted(self, member: Member, device: torch.device, traceparent: str) -> Iterator[float]:
        """Around an attempt with tensors on `device`; when it began."""
        started, outcome = time.perf_counter(), "cancelled"
        try:
            yield started
            outcome = "ok"
        except ExpertdError as error:
            outcome = error.code.name.lower()
            raise
        finally:
            seconds, trace = time.perf_counter() - started, traceparent[3:35]
            self._config.metrics.attempts.ended(
                member.transport.address, member.reached(device), outcome, seconds, trace
            )

    async def _let_recover(self, member: Member) -> None:
        """Wait as long as a full server asked for, when it is asked nevertheless: then nobody else has the experts."""
        now = time.monotonic()
        if member.busy_until > now:
            # Callers that were refused together do not come back together.
            pause = (member.busy_until - now) * random.uniform(1.0, 1.5)
            await asyncio.sleep(min(pause, max(0.0, self._deadline - now)))

    def _count(self, parts: Sequence[Part], sign: int) -> None:
        self._caller.count(((member, len(dispatch.tokens)) for member, dispatch in parts), sign)


async def _unless_silent(member: Member, call: ExecuteCall) -> ExecuteResult:
    """The answer of `member`. Raises `Unavailable` as soon as it turns out to be silent."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as scope:
            give_up = partial(scope.reschedule, loop.time())
            member.under_way.add(give_up)
            try:
                return await member.transport.execute(call)
            finally:
                member.under_way.discard(give_up)
    except DeadlineExceeded:
        raise
    except TimeoutError:
        raise (member.why_not or Unavailable(f"{member.transport.address}: it is silent")).again() from None


def _ignore(attempt: asyncio.Future[list[Answer]]) -> None:
    """Whatever becomes of an attempt that nobody waits for any more is nobody's error."""
    if not attempt.cancelled():
        attempt.exception()


async def _all_or_error(calls: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """All results, in order; or the first error, with the other calls cancelled."""
    if len(calls) == 1:
        return [await calls[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
