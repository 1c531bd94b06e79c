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

from expertd.client.config import CoordinatorConfig
from expertd.client.dispatch import Dispatch, check_receipt, plan_dispatch, take_rows
from expertd.client.membership import LOST, Member, Membership
from expertd.client.ownership import NOBODY
from expertd.proto.codec import ExecuteCall, ExecuteResult
from expertd.proto.errors import DeadlineExceeded, ExpertdError, Overloaded, Unavailable

T = TypeVar("T")
BACKOFF_SECONDS = 0.025
"""Before the second attempt; doubled before every further one, with up to half of it taken off or added."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one dispatch."""

    dispatch: Dispatch
    result: ExecuteResult
    address: str
    round_trip: float
    """Seconds."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Who failed, and how."""

    member: Member
    error: ExpertdError


class LayerCall:
    """The tokens of one call of `layer`, as they are sent: [T, H] FP8 with scales or bfloat16."""

    def __init__(
        self,
        membership: Membership,
        config: CoordinatorConfig,
        request_ids: itertools.count[int],
        layer: int,
        hidden: Tensor,
        scales: Tensor | None,
    ) -> None:
        self._membership = membership
        self._config = config
        self._request_ids = request_ids
        self._layer = layer
        self._hidden = hidden
        self._scales = scales
        self._deadline = time.monotonic() + config.call_timeout

    async def run(self, ids: Tensor, weights: Tensor) -> list[Answer]:
        """Compute all pairs of [T, k] ids and weights, each exactly once; the answers in a fixed order.

        Raises the last error of a part whose attempts or time ran out.
        """
        whole = Dispatch(NOBODY, torch.arange(len(ids)), ids, weights)
        return await self._place(whole, attempt=1)

    async def _place(self, work: Dispatch, attempt: int, failed: Failure | None = None) -> list[Answer]:
        """Send `work` to owners of its experts, waiting a little for owners that are out of use.

        After a failure, the member that failed is asked again only when nobody else owns the experts.
        """
        while True:
            if attempt > 1:
                await asyncio.sleep(BACKOFF_SECONDS * 2 ** (attempt - 2) * random.uniform(0.5, 1.5))
            owners = self._membership.owners(self._layer, avoid=failed.member if failed else None)
            try:
                parts = plan_dispatch(work.expert_ids, work.weights, owners)
            except Unavailable as nobody:
                if attempt >= self._config.max_attempts:
                    cause = f"; last error: {failed.error}" if failed else ""
                    raise Unavailable(f"layer {self._layer}: {nobody}{cause}") from None
                attempt += 1
            else:
                return await self._send_all([replace(part, tokens=work.tokens[part.tokens]) for part in parts], attempt)

    async def _send_all(self, dispatches: Sequence[Dispatch], attempt: int) -> list[Answer]:
        parts = [part for dispatch in dispatches for part in dispatch.split(self._chunk_tokens(dispatch))]
        # Counted before anything is awaited, so that calls which start together see each other.
        self._count(parts, 1)
        try:
            answers = await _all_or_error([self._send(part, attempt) for part in parts])
        finally:
            self._count(parts, -1)
        return list(itertools.chain.from_iterable(answers))

    def _count(self, parts: Sequence[Dispatch], sign: int) -> None:
        for part in parts:
            self._membership.members[part.server].outstanding_tokens += sign * len(part.tokens)

    def _chunk_tokens(self, dispatch: Dispatch) -> int:
        chunk = self._config.chunk_tokens(self._hidden.shape[1])
        shard = self._membership.members[dispatch.server].shard
        return min(chunk, shard.max_tokens_per_request) if shard else chunk

    async def _send(self, dispatch: Dispatch, attempt: int) -> list[Answer]:
        try:
            return [await self._attempt(dispatch)]
        except (*LOST, Overloaded) as error:
            if time.monotonic() >= self._deadline:
                # The caller's time is up, which says nothing about the server.
                raise
            failed = Failure(self._membership.members[dispatch.server], error)
        self._membership.report(failed.member, failed.error)
        if attempt >= self._config.max_attempts:
            raise failed.error
        return await self._place(dispatch, attempt + 1, failed)

    async def _attempt(self, dispatch: Dispatch) -> Answer:
        member = self._membership.members[dispatch.server]
        address, shard = member.transport.address, member.shard
        timeout = min(self._config.attempt_timeout, self._deadline - time.monotonic())
        if shard is None:
            raise Unavailable(f"{address}: out of use since another call failed")
        if timeout <= 0:
            raise DeadlineExceeded(f"{address}: not answered within call_timeout {self._config.call_timeout} s")
        call = ExecuteCall(
            request_id=next(self._request_ids),
            model_fingerprint=shard.model_fingerprint,
            placement_epoch=shard.placement_epoch,
            layer=self._layer,
            hidden=take_rows(self._hidden, dispatch.tokens),
            scales=None if self._scales is None else take_rows(self._scales, dispatch.tokens),
            expert_ids=dispatch.expert_ids,
            weights=dispatch.weights,
            reply_dtype=self._config.reply_dtype,
            timeout=timeout,
        )
        started = time.perf_counter()
        result = await member.transport.execute(call)
        check_receipt(dispatch, result.receipt, address)
        return Answer(dispatch, result, address, time.perf_counter() - started)


async def _all_or_error(calls: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """All results, in order; or the first error, with the other calls cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
