"""One call of a layer: its parts sent at once, and what fails sent again to other owners.

A call is a pure function of its request, so repeating it is always right; an answer that comes after its attempt was
given up is never looked at.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from expertd.client.call.activations import Activations
from expertd.client.call.budget import RetryBudget
from expertd.client.call.choice import candidates, choose
from expertd.client.call.dispatch import Dispatch, Work, check_receipt, leave_out, plan_dispatch
from expertd.client.call.hedging import Lateness
from expertd.client.call.result import Answer, Effort
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.fleet.membership import LOST, Member, Membership
from expertd.client.telemetry.tracing import attempt_span
from expertd.proto.base.errors import DeadlineExceeded, ExpertdError, Overloaded, Unavailable
from expertd.proto.codec import ExecuteCall

T = TypeVar("T")
BACKOFF_SECONDS = 0.025
"""Before the second attempt; doubled before every further one, with up to half of it taken off or added."""
Part = tuple[Member, Dispatch]


@dataclass(frozen=True, slots=True)
class Failure:
    """Who failed, and how."""

    member: Member
    error: ExpertdError


class Caller:
    """What the calls of one coordinator share."""

    def __init__(self, membership: Membership, config: CoordinatorConfig) -> None:
        self.membership = membership
        self.config = config
        self.request_ids = itertools.count(1)
        self.budget = RetryBudget(config.retry_ratio, config.retry_burst)
        self.lateness = None if config.hedge_quantile is None else Lateness(config.hedge_quantile)
        # Coordinators that start together must not all prefer the same one of two idle replicas.
        self._first = random.random()

    def choose(self, layer: int, avoid: Member | None) -> Tensor:
        """[n_routed_experts] int64: number of the member to ask for each expert, or `NOBODY`; `avoid` only in need."""
        owned = self.membership.ownership.owned[layer]
        known = candidates(self.membership.owners, self.config.locality, self._first, time.monotonic())
        return choose(owned, known, None if avoid is None else avoid.number)


class LayerCall:
    """One call of `layer`."""

    def __init__(self, caller: Caller, layer: int, activations: Activations) -> None:
        self._caller = caller
        self._membership = caller.membership
        self._config = caller.config
        self._layer = layer
        self._activations = activations
        self._deadline = time.monotonic() + caller.config.call_timeout
        self.effort = Effort()
        self.missing: list[Work] = []
        """What nobody computed, where the caller allows that."""

    async def run(self, ids: Tensor, weights: Tensor) -> list[Answer]:
        """Compute all pairs of [T, k] ids and weights, each exactly once; the answers in a fixed order.

        Raises the last error of a part whose attempts or time ran out, unless what is missing may be left out.
        """
        try:
            return await self._place(Work(torch.arange(len(ids)), ids, weights), attempt=1)
        finally:
            self._config.metrics.spent(self.effort.retries, self.effort.failovers, self.effort.hedges)

    async def _place(self, work: Work, attempt: int, failed: Failure | None = None) -> list[Answer]:
        """Send `work` to owners of its experts, waiting a little for owners that are out of use.

        After a failure, the member that failed is asked again only when nobody else owns the experts.
        """
        if attempt > 1:
            await asyncio.sleep(BACKOFF_SECONDS * 2 ** (attempt - 2) * random.uniform(0.5, 1.5))
        while True:
            chosen = self._caller.choose(self._layer, avoid=failed.member if failed else None)
            try:
                parts = self._parts(work, chosen)
            except Unavailable as nobody:
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
            parts.extend((member, piece) for piece in dispatch.split(self._chunk_tokens(member)))
        return parts

    def _chunk_tokens(self, member: Member) -> int:
        chunk = self._config.chunk_tokens(self._activations.width, member.transport.chunk_bytes)
        return min(chunk, member.shard.max_tokens_per_request) if member.shard else chunk

    async def _send_all(self, parts: Sequence[Part], attempt: int) -> list[Answer]:
        if attempt == 1:
            self._caller.budget.earn(len(parts))
            self._config.metrics.fan_out(len({member.number for member, _ in parts}))
        # Counted before anything is awaited, so that calls which start together see each other.
        _count(parts, 1)
        try:
            answers = await _all_or_error([self._send(*part, attempt) for part in parts])
        finally:
            _count(parts, -1)
        return list(itertools.chain.from_iterable(answers))

    async def _send(self, member: Member, dispatch: Dispatch, attempt: int) -> list[Answer]:
        try:
            return await self._attempt_or_hedge(member, dispatch)
        except (*LOST, Overloaded) as error:
            if time.monotonic() >= self._deadline:
                # The caller's time is up, which says nothing about the server.
                raise
            failed = Failure(member, error)
        self._membership.report(member, failed.error)
        if attempt < self._config.max_attempts and self._caller.budget.take():
            return await self._place(dispatch, attempt + 1, failed)
        if self._config.on_missing == "renormalize":
            self.missing.append(dispatch)
            return []
        raise failed.error

    async def _attempt_or_hedge(self, member: Member, dispatch: Dispatch) -> list[Answer]:
        """The answer of `member`; where it is late and others own the experts too, theirs if that comes first."""
        lateness = self._caller.lateness
        if lateness is None or lateness.limit is None:
            return [await self._attempt(member, dispatch)]
        first = asyncio.ensure_future(_all_or_error([self._attempt(member, dispatch)]))
        attempts = {first}
        try:
            await asyncio.wait(attempts, timeout=lateness.limit)
            if not first.done() and (others := self._others(member, dispatch)) and self._caller.budget.take():
                self.effort.hedges += 1
                attempts.add(asyncio.ensure_future(self._hedge(others)))
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
            for attempt in attempts:
                attempt.cancel()

    async def _hedge(self, others: Sequence[Part]) -> list[Answer]:
        _count(others, 1)
        try:
            return await _all_or_error([self._attempt(*part) for part in others])
        finally:
            _count(others, -1)

    def _others(self, member: Member, dispatch: Dispatch) -> list[Part]:
        """How servers beside `member` would compute `dispatch`; empty when they cannot."""
        try:
            parts = self._parts(dispatch, self._caller.choose(self._layer, avoid=member))
        except Unavailable:
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
                model_fingerprint=shard.model_fingerprint,
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
            started = time.perf_counter()
            result = await member.transport.execute(call)
            seconds = time.perf_counter() - started
            check_receipt(dispatch, result.receipt, address)
        member.failures = 0
        if self._caller.lateness is not None:
            self._caller.lateness.answered(seconds)
        return Answer(dispatch, result, address, seconds)

    async def _let_recover(self, member: Member) -> None:
        """Wait as long as a full server asked for, when it is asked nevertheless: then nobody else has the experts."""
        now = time.monotonic()
        if member.busy_until > now:
            # Callers that were refused together do not come back together.
            pause = (member.busy_until - now) * random.uniform(1.0, 1.5)
            await asyncio.sleep(min(pause, max(0.0, self._deadline - now)))


def _count(parts: Sequence[Part], sign: int) -> None:
    for member, dispatch in parts:
        member.outstanding_tokens += sign * len(dispatch.tokens)


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
