"""The servers of a coordinator: which there are, and which are alive."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Callable
from functools import partial

from expertd.client.fleet.asking import ask
from expertd.client.fleet.discovery import Discovery
from expertd.client.fleet.holdings import Holdings
from expertd.client.fleet.member import LOST, Member
from expertd.client.fleet.ownership import check_complete
from expertd.client.fleet.pace import Pace
from expertd.client.transport.interface import Silent, Transport
from expertd.proto.base.errors import ExpertdError, ModelMismatch, StalePlacement, Unavailable, UnknownExpert
from expertd.proto.base.tasks import Tasks

log = logging.getLogger(__name__)
PROBE_SECONDS = 0.25
"""Between two looks at a server that failed."""
LONGEST_PAUSE = 2.0
"""Seconds before a look at a server that answers its probes and fails its calls."""
PROBE_TIMEOUT = 2.0


class Membership:
    """Finds out which servers there are, and takes those that fail out of use until they answer again."""

    def __init__(
        self,
        discovery: Discovery,
        open_transport: Callable[[str], Transport],
        tasks: Tasks,
        *,
        complete: bool,
        model_fingerprint: str | None = None,
        locality: str = "",
    ) -> None:
        """`tasks` are closed with it. With `complete`, connecting fails unless every expert has an owner.

        Servers of other models than that with `model_fingerprint` are never used; without it, see `choose_model`.
        `locality` is where the coordinator is.
        """
        self.members: dict[int, Member] = {}
        self.holdings = Holdings(self.members, model_fingerprint=model_fingerprint, locality=locality)
        self._discovery = discovery
        self._open_transport = open_transport
        self._tasks = tasks
        self._complete = complete
        self._next_number = 0
        self._last_loss = -math.inf
        self._changed = asyncio.Event()

    async def connect(self, timeout: float) -> None:
        """Ask every server, for at most `timeout` seconds; those that have not answered by then are probed.

        It does not wait for all once what has answered owns every expert. Raises `Unavailable` when no server is found,
        the first error when none answers, `ModelMismatch` when they hold several models of which none is to be
        preferred, and `UnknownExpert` when an expert is left without an owner.
        """
        try:
            found = await self._discovery.addresses()
        except (OSError, ValueError) as error:
            raise Unavailable(f"no server found: {error}") from error
        members = [self._add(address) for address in found]
        await ask(members, timeout, self.holdings.suffice)
        if all(member.shard is None for member in members):
            raise next(member.why_not for member in members if member.why_not is not None)
        self.holdings.begin()
        try:
            if self._complete:
                check_complete(self.holdings.ownership)
        except UnknownExpert as missing:
            unreachable = "".join(f"; {member.why_not}" for member in members if not member.in_use)
            raise UnknownExpert(f"{missing}{unreachable}") from None
        for member in members:
            self._follow(member)
        pace = Pace(lambda: self.members.values(), self._tasks)
        self._tasks.keep(pace.judge, "comparing how fast servers answer")
        if math.isfinite(self._discovery.seconds):
            self._tasks.keep(self._discover, f"looking for servers in {self._discovery}")

    async def close(self) -> None:
        self.holdings.forget()
        await self._tasks.close()
        await asyncio.gather(*(member.transport.close() for member in self.members.values()))

    def report(self, member: Member, error: ExpertdError) -> None:
        """Tell that a call to `member` failed; it is taken out of use unless it is only busy."""
        if error.retry_after is not None:
            member.busy_until = time.monotonic() + error.retry_after
        if isinstance(error, LOST) and member.in_use and self.holdings:
            log.warning("%s is out of use: %s", member.transport.address, error)
            member.in_use, member.why_not = False, error
            # Who tells that it owns others by now is to be asked again at once.
            member.failures += not isinstance(error, StalePlacement)
            member.lost.set()
            self._last_loss = time.monotonic()

    def out_of_use(self) -> str:
        """The servers out of use and why, for an error message; empty when there are none."""
        lost = [member.why_not for member in self.members.values() if not member.in_use and member.why_not]
        # Of many, those first that will not come back by themselves.
        reasons = [str(error) for error in sorted(lost, key=lambda error: not isinstance(error, ModelMismatch))]
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
        self.holdings.resolve()
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
                    error = watching.result()
                    self.report(member, error)
                    for give_up in tuple(member.under_way) if isinstance(error, Silent) else ():
                        give_up()
            finally:
                watching.cancel()
                lost.cancel()

    async def _admit(self, member: Member) -> None:
        """Ask until the server answers with a shard of this model, then use it with what it owns by then."""
        pause = 0.0 if member.failures < 2 else min(PROBE_SECONDS * 2.0 ** (member.failures - 2), LONGEST_PAUSE)
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = PROBE_SECONDS
            if member.in_use:
                # With others of its model.
                return
            try:
                shard = await member.transport.get_shard(PROBE_TIMEOUT)
                if member.shard is not None and member.shard.placement_epoch != shard.placement_epoch:
                    await self._look_again(member)
                if self.holdings.steer(member, shard):
                    self._announce()
                self.holdings.check(member, shard)
            except ModelMismatch as error:
                if str(error) != str(member.why_not):
                    log.error("%s stays out of use: %s", member.transport.address, error)
                member.why_not = error
                continue
            except ExpertdError as error:
                log.debug("%s is still out of use: %s", member.transport.address, error)
                member.why_not = error if isinstance(error, Unavailable) else member.why_not
                continue
            log.warning("%s is in use", member.transport.address)
            member.shard, member.other, member.in_use = shard, None, True
            self.holdings.resolve()
            self._announce()
            return

    async def _look_again(self, changed: Member) -> None:
        """Ask the others in use: what `changed` gave up, one of them may have taken over before."""

        async def ask(member: Member) -> None:
            with contextlib.suppress(ExpertdError):
                shard = await member.transport.get_shard(PROBE_TIMEOUT)
                self.holdings.check(member, shard)
                member.shard = shard

        await asyncio.gather(*(ask(one) for one in self.members.values() if one.in_use and one is not changed))

    def _announce(self) -> None:
        """Wake those who wait for a server to come into use."""
        self._changed.set()
        self._changed = asyncio.Event()
