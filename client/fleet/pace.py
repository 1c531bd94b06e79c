"""Servers that are much slower than others are asked only in need, until they are as fast again."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Collection
from functools import partial

import torch

from expertd.client.fleet.latency import LEAST_SECONDS, compare
from expertd.client.fleet.member import Member
from expertd.kernels.model.config import MoeConfig
from expertd.proto.base.errors import ExpertdError
from expertd.proto.base.tasks import Tasks
from expertd.proto.codec import ExecuteCall

log = logging.getLogger(__name__)
JUDGE_SECONDS = 0.25
"""Between two comparisons."""
TRIAL_SECONDS, LONGEST_TRIAL_SECONDS = 0.5, 30.0
"""Between two trials of a slow server; doubled after each that it fails."""
TRIALS = 3
"""In a row that it must pass."""
TRIAL_RATIO, TRIAL_TIMEOUT = 2.0, 5.0
FIRST_TRIAL = 1 << 62
"""Trials' request_ids are far from those of calls, which are counted from 1."""


class Pace:
    """Compares the members that are in use, for ever."""

    def __init__(self, members: Callable[[], Collection[Member]], tasks: Tasks) -> None:
        self._members = members
        self._tasks = tasks
        self._numbers = itertools.count(FIRST_TRIAL)

    async def judge(self) -> None:
        while True:
            await asyncio.sleep(JUDGE_SECONDS)
            self.compare()

    def compare(self) -> None:
        """Weigh members by how long they take; set aside those that take far too long."""
        now = time.monotonic()
        members = {member.number: member for member in self._comparable() if not member.slow}
        known = {number: member.latency.known(now) for number, member in members.items()}
        left = len(members)
        for number, slowness in sorted(compare(known).items(), key=lambda one: -one[1].ratio):
            member = members[number]
            member.weight = slowness.ratio
            if slowness.is_outlier and left > 1:
                left -= 1
                address = member.transport.address
                log.warning("%s takes %.1f times as long as others: it is asked only in need", address, slowness.ratio)
                member.slow = True
                self._tasks.keep(partial(self._until_fast, member), f"trying whether {address} is as fast again")

    async def _until_fast(self, member: Member) -> None:
        """Send calls of one token to it and to another server, and compare."""
        passed, pause = 0, TRIAL_SECONDS
        while passed < TRIALS and member in self._members():
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))
            others = [one for one in self._comparable() if one is not member]
            if not others or not member.in_use:
                continue
            chosen = random.choice([one for one in others if not one.slow] or others)
            own, other = await asyncio.gather(self._trial(member), self._trial(chosen))
            if own is None or other is None or own > TRIAL_RATIO * other + LEAST_SECONDS:
                passed, pause = 0, min(2 * pause, LONGEST_TRIAL_SECONDS)
            else:
                passed, pause = passed + 1, TRIAL_SECONDS
        member.latency.forget()
        member.slow, member.weight = False, 1.0
        log.warning("%s is as fast as others again", member.transport.address)

    def _comparable(self) -> list[Member]:
        """Members that are in use and own something."""
        return [one for one in self._members() if one.in_use and one.shard is not None and one.shard.experts]

    async def _trial(self, member: Member) -> float | None:
        """Seconds that one token takes; None without an answer, or without an expert."""
        shard = member.shard
        if shard is None or not shard.experts:
            return None
        width = MoeConfig(**shard.config).hidden_size  # type: ignore[arg-type]
        layer, (expert, *_) = next(iter(shard.experts.items()))
        call = ExecuteCall(
            request_id=next(self._numbers),
            model_fingerprint=shard.model_fingerprint,
            placement_epoch=None,
            layer=layer,
            hidden=torch.zeros(1, width, dtype=torch.bfloat16, device="cpu"),
            scales=None,
            expert_ids=torch.tensor([[expert]], dtype=torch.int32, device="cpu"),
            weights=torch.zeros(1, 1, dtype=torch.float32, device="cpu"),
            reply_dtype=torch.bfloat16,
            timeout=TRIAL_TIMEOUT,
        )
        began = time.perf_counter()
        try:
            await member.transport.execute(call)
        except ExpertdError:
            return None
        return time.perf_counter() - began
