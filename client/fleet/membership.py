"""The servers of a coordinator: which there are, which are alive, and what they own now."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from expertd.client.fleet.discovery import Discovery
from expertd.client.fleet.ownership import Ownership, check_complete, check_replicas, resolve_ownership
from expertd.client.transport.interface import Transport
from expertd.proto.base.errors import (
    Cancelled,
    DeadlineExceeded,
    ExpertdError,
    ModelMismatch,
    ServerFault,
    StalePlacement,
    Unavailable,
    UnknownExpert,
)
from expertd.proto.base.tasks import Tasks
from expertd.proto.codec import ShardInfo

log = logging.getLogger(__name__)
PROBE_SECONDS = 0.25
"""Between two looks at a server that failed."""
LONGEST_PAUSE = 2.0
"""Seconds before a look at a server that answers its probes and fails its calls."""
PROBE_TIMEOUT = 2.0
LOST = (Unavailable, DeadlineExceeded, Cancelled, ServerFault, StalePlacement, UnknownExpert, ModelMismatch)
"""Errors after which a server is not used until it has answered a probe."""


@dataclass(slots=True, eq=False)
class Member:
    """One server."""

    number: int
    """Never given to another one."""
    transport: Transport
    shard: ShardInfo | None = None
    """What it owned when it was asked last."""
    in_use: bool = False
    why_not: ExpertdError | None = None
    """Why it went out of use."""
    outstanding_tokens: int = 0
    busy_until: float = 0.0
    """On the monotonic clock: when a server that was full wants to be asked again."""
    failures: int = 0
    """Losses in a row, without an answered call in between."""
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    follower: asyncio.Task[None] | None = None


class Membership:
    """Finds out which servers there are and what they own, takes those that fail out of use until they answer again."""

    def __init__(
        self, discovery: Discovery, open_transport: Callable[[str], Transport], tasks: Tasks, *, complete: bool
    ) -> None:
        """`tasks` are closed with it. With `complete`, connecting fails unless every expert has an owner."""
        self.members: dict[int, Member] = {}
        self.owners: tuple[Member, ...] = ()
        """Whose shards `ownership` has, row by row."""
        self._discovery = discovery
        self._open_transport = open_transport
        self._tasks = tasks
        self._complete = complete
        self._ownership: Ownership | None = None
        self._next_number = 0
        self._last_loss = -math.inf
        self._changed = asyncio.Event()

    @property
    def ownership(self) -> Ownership:
        """Raises `RuntimeError` before `connect` and after `close`."""
        if self._ownership is None:
            raise RuntimeError("the coordinator is not connected; use it in 'async with Coordinator(...) as moe:'")
        return self._ownership

    async def connect(self, timeout: float) -> None:
        """Ask every server, for at most `timeout` seconds; those that do not answer are probed from then on.

        Raises `Unavailable` when no server is found, the first error when none answers, and `UnknownExpert` when an
        expert is left without an owner.
        """
        try:
            found = await self._discovery.addresses()
        except (OSError, ValueError) as error:
            raise Unavailable(f"no server found: {error}") from error
        members = [self._add(address) for address in found]
        asked = (member.transport.get_shard(timeout) for member in members)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        for member, answer in zip(members, answers, strict=True):
            if isinstance(answer, ExpertdError):
                member.why_not = answer
            elif not isinstance(answer, BaseException):
                member.shard, member.in_use = answer, True
        if len(errors) == len(answers):
            raise errors[0]
        self._resolve()
        try:
            if self._complete:
                check_complete(self.ownership)
        except UnknownExpert as missing:
            unreachable = "".join(f"; {error}" for error in errors)
            raise UnknownExpert(f"{missing}{unreachable}") from None
        for member in members:
            self._follow(member)
        if math.isfinite(self._discovery.seconds):
            self._tasks.keep(self._discover, f"looking for servers in {self._discovery}")

    async def close(self) -> None:
        self._ownership = None
        await self._tasks.close()
        await asyncio.gather(*(member.transport.close() for member in self.members.values()))

    def report(self, member: Member, error: ExpertdError) -> None:
        """Tell that a call to `member` failed; it is taken out of use unless it is only busy."""
        if error.retry_after is not None:
            member.busy_until = time.monotonic() + error.retry_after
        if isinstance(error, LOST) and member.in_use and self._ownership is not None:
            log.warning("%s is out of use: %s", member.transport.address, error)
            member.in_use, member.why_not = False, error
            member.failures += 1
            member.lost.set()
            self._last_loss = time.monotonic()

    def out_of_use(self) -> str:
        """The servers out of use and why, for an error message; empty when there are none."""
        reasons = [str(member.why_not) for member in self.members.values() if not member.in_use and member.why_not]
        return f"; out of use: {', '.join(reasons[:4])}" if reasons else ""

    async def wait_for_change(self, patience: float) -> bool:
        """Wait until a server comes into use, if one went out of use less than `patience` seconds ago.

        Whether one did: False says that there is nothing to wait for, or that the time is over.
        """
        try:
            async with asyncio.timeout(self._last_loss + patience - time.monotonic()):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _add(self, address: str) -> Member:
        member = Member(self._next_number, self._open_transport(address))
        self._next_number += 1
        self.members[member.number] = member
        return member

    def _follow(self, member: Member) -> None:
        member.follower = self._tasks.keep(partial(self._keep, member), f"watching {member.transport.address}")

    async def _discover(self) -> None:
        """Look for servers that came or went, for ever."""
        while True:
            await asyncio.sleep(self._discovery.seconds)
            try:
                found = await self._discovery.addresses()
            except (OSError, ValueError) as error:
                log.warning("the servers stay as they are: %s", error)
                continue
            known = {member.transport.address: member for member in self.members.values()}
            for address in found:
                if address not in known:
                    log.warning("%s joins", address)
                    self._follow(self._add(address))
            for address in known.keys() - set(found):
                log.warning("%s leaves", address)
                self._tasks.start(self._retire(known[address]), f"parting with {address}")

    async def _retire(self, member: Member) -> None:
        """Ask `member` no more, and part with it when it has answered."""
        del self.members[member.number]
        if member.follower is not None:
            member.follower.cancel()
        member.in_use = False
        # Who takes its place may have been found by the same look, and is not in use yet.
        self._last_loss = time.monotonic()
        self._resolve()
        try:
            while member.outstanding_tokens:
                await asyncio.sleep(PROBE_SECONDS)
        finally:
            await member.transport.close()

    async def _keep(self, member: Member) -> None:
        """Bring `member` into use and watch it until it is lost, again and again."""
        while True:
            if not member.in_use:
                await self._admit(member)
            member.lost.clear()
            watching = asyncio.ensure_future(member.transport.until_not_serving())
            lost = asyncio.ensure_future(member.lost.wait())
            try:
                await asyncio.wait((watching, lost), return_when=asyncio.FIRST_COMPLETED)
                if watching.done():
                    self.report(member, watching.result())
            finally:
                watching.cancel()
                lost.cancel()

    async def _admit(self, member: Member) -> None:
        """Ask until the server answers with a shard of this model, then use it with what it owns by then."""
        pause = 0.0 if member.failures < 2 else min(PROBE_SECONDS * 2.0 ** (member.failures - 2), LONGEST_PAUSE)
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = PROBE_SECONDS
            try:
                shard = await member.transport.get_shard(PROBE_TIMEOUT)
                self._check(member, shard)
            except ModelMismatch as error:
                if str(error) != str(member.why_not):
                    log.error("%s stays out of use: %s", member.transport.address, error)
                member.why_not = error
                continue
            except ExpertdError as error:
                log.debug("%s is still out of use: %s", member.transport.address, error)
                continue
            log.warning("%s is in use", member.transport.address)
            member.shard, member.in_use = shard, True
            self._resolve()
            self._changed.set()
            self._changed = asyncio.Event()
            return

    def _check(self, member: Member, shard: ShardInfo) -> None:
        """Raise `ModelMismatch` where `member` cannot serve beside those in use."""
        if shard.model_fingerprint != self.ownership.model_fingerprint:
            raise ModelMismatch(f"it holds another model, {shard.model_fingerprint!r}")
        others = [(one.transport.address, one.shard) for one in self.members.values() if one is not member]
        known = [(address, told) for address, told in others if told is not None]
        check_replicas([*known, (member.transport.address, shard)], self.ownership.config)

    def _resolve(self) -> None:
        known = [(member, member.shard) for member in self.members.values() if member.shard is not None]
        # When all servers were replaced at once, what the former ones owned remains known until a new one has answered.
        if known:
            self.owners = tuple(member for member, _ in known)
            self._ownership = resolve_ownership([(member.transport.address, shard) for member, shard in known])
