"""The servers of a coordinator: which there are, which are alive, and what they own now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from expertd.client.fleet.asking import ask
from expertd.client.fleet.discovery import Discovery
from expertd.client.fleet.member import LOST, Member
from expertd.client.fleet.models import Called, choose_generation, choose_model, is_complete, of_model
from expertd.client.fleet.ownership import Ownership, check_complete, check_replicas, resolve_ownership
from expertd.client.fleet.pace import Pace
from expertd.client.transport.interface import Silent, Transport
from expertd.proto.base.errors import (
    ExpertdError,
    ModelMismatch,
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


class Known(NamedTuple):
    """What is known of the servers with certain weights."""

    members: tuple[Member, ...]
    ownership: Ownership
    """Its rows are those of `members`."""


class Membership:
    """Finds out which servers there are and what they own, takes those that fail out of use until they answer again."""

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
        self._discovery = discovery
        self._open_transport = open_transport
        self._tasks = tasks
        self._complete = complete
        self._pinned = model_fingerprint
        self._locality = locality
        self._called = Called("")
        self._known: dict[str, Known] = {}
        self._ever_owned: dict[int, Tensor] = {}
        self._next_number = 0
        self._last_loss = -math.inf
        self._changed = asyncio.Event()

    @property
    def known(self) -> Known:
        """Of the weights that most calls use. Any thread.

        Raises `RuntimeError` before `connect` and after `close`.
        """
        known = self._known.get(self._called.main)
        if known is None:
            raise RuntimeError("the coordinator is not connected; use it in 'async with Coordinator(...) as moe:'")
        return known

    def known_of(self, fingerprint: str) -> Known | None:
        """Of any weights that servers in use have. Any thread."""
        return self._known.get(fingerprint)

    def draw(self) -> str:
        """The fingerprint of the weights that a call is to use. Any thread."""
        called = self._called
        other = called.other if called.other in self._known else None
        return called.main if other is None or random.random() >= called.share else other

    def is_called(self, fingerprint: str) -> bool:
        """Whether calls use weights with this fingerprint now. Any thread."""
        return fingerprint in self._called.fingerprints and fingerprint in self._known

    @property
    def ownership(self) -> Ownership:
        """See `known`."""
        return self.known[1]

    def count_ownerless(self) -> int:
        """Experts, counted in each layer, that had an owner since `connect` and have none in use. Any thread."""
        if not self._known:
            return 0
        members, ownership = self.known
        rows = [row for row, member in enumerate(members) if member.in_use]
        owned = ownership.owned
        return sum(
            int((ever & ~owned[layer][rows].any(dim=0)).sum()) if layer in owned else int(ever.sum())
            for layer, ever in tuple(self._ever_owned.items())
        )

    def loads(self) -> dict[tuple[str, int], dict[str, float]]:
        """Pairs of the last minutes by model and layer, and then by server: of those in use that own experts of the
        layer, where there are any in this locality of them alone. Any thread."""
        if not self._known:
            return {}
        members, ownership = self.known
        using = [(member, member.shard) for member in members if member.in_use and member.shard is not None]
        near = [(member, shard) for member, shard in using if self._locality in ("", shard.locality)]
        loads: dict[tuple[str, int], dict[str, float]] = {}
        for member, shard in near or using:
            for layer in shard.layers:
                key = ownership.model_fingerprint, layer
                loads.setdefault(key, {})[member.transport.address] = member.load.lately(layer)
        return loads

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
        await ask(members, timeout, self._suffices)
        told = self._told()
        if not told:
            raise next(member.why_not for member in members if member.why_not is not None)
        servers = [(member.transport.address, shard) for member, shard in told]
        main = choose_model(servers, self._pinned)
        for member, _ in told:
            member.in_use = True
        self._adopt(choose_generation(servers, main) if self._pinned is None else Called(main))
        try:
            if self._complete:
                check_complete(self.ownership)
        except UnknownExpert as missing:
            unreachable = "".join(f"; {member.why_not}" for member in members if not member.in_use)
            raise UnknownExpert(f"{missing}{unreachable}") from None
        for member in members:
            self._follow(member)
        pace = Pace(lambda: self.members.values(), self._tasks)
        self._tasks.keep(pace.judge, "comparing how fast servers answer")
        if math.isfinite(self._discovery.seconds):
            self._tasks.keep(self._discover, f"looking for servers in {self._discovery}")

    def _suffices(self) -> bool:
        """Whether what servers told makes up a model, and no other than would be called in the end."""
        told = [(member.transport.address, shard) for member, shard in self._told()]
        models = {shard.model_fingerprint for _, shard in told}
        if self._pinned is not None:
            models = {self._pinned}
        return len(models) == 1 and is_complete(of_model(told, models.pop()))

    def _told(self) -> list[tuple[Member, ShardInfo]]:
        return [(member, member.shard) for member in self.members.values() if member.shard is not None]

    async def close(self) -> None:
        self._known = {}
        await self._tasks.close()
        await asyncio.gather(*(member.transport.close() for member in self.members.values()))

    def report(self, member: Member, error: ExpertdError) -> None:
        """Tell that a call to `member` failed; it is taken out of use unless it is only busy."""
        if error.retry_after is not None:
            member.busy_until = time.monotonic() + error.retry_after
        if isinstance(error, LOST) and member.in_use and self._known:
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

    def standings(self) -> Counter[str]:
        """How many servers there are of each standing. Any thread."""
        return Counter(member.standing for member in tuple(self.members.values()))

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
                self._steer(member, shard)
                self._check(member, shard)
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
            self._resolve()
            self._announce()
            return

    async def _look_again(self, changed: Member) -> None:
        """Ask the others in use: what `changed` gave up, one of them may have taken over before."""

        async def ask(member: Member) -> None:
            with contextlib.suppress(ExpertdError):
                shard = await member.transport.get_shard(PROBE_TIMEOUT)
                if shard.of(self._called.main) is None:
                    member.other = shard
                    return
                self._check(member, shard)
                member.shard = shard

        await asyncio.gather(*(ask(one) for one in self.members.values() if one.in_use and one is not changed))

    def _check(self, member: Member, shard: ShardInfo) -> None:
        """Raise `ModelMismatch` where `member` cannot serve beside those in use."""
        main = self._called.main
        ours = shard.of(main)
        if ours is None:
            member.other = shard
            raise _another_model(member, shard, main)
        others = [(one.transport.address, told) for one, told in self._told() if one is not member]
        check_replicas([*of_model(others, main), (member.transport.address, ours)], self.ownership.config)

    def _steer(self, member: Member, shard: ShardInfo) -> None:
        """Call other weights of the same shape where servers want that, `member` with what it tells among them."""
        if self._pinned is not None:
            return
        alive = [(one, one.other or one.shard) for one in self.members.values() if one.in_use or one.other is not None]
        told = [(one.transport.address, known) for one, known in alive if one is not member and known is not None]
        told.append((member.transport.address, shard))
        called = choose_generation(told, self._called.main)
        if called.main != self._called.main:
            if resolve_ownership(of_model(told, called.main)).config != self.ownership.config:
                return
            log.warning("the servers want weights %r to be used now", called.main)
            # Until it is adopted: it is there, whatever it has.
            member.other = shard
            self._adopt(called)
            self._announce()
        elif called != self._called:
            log.info("%g of the calls use weights %r", called.share, called.other or called.main)
            self._called = called

    def _adopt(self, called: Called) -> None:
        """Use the servers that can be reached and have these weights, and no others."""
        self._called = called
        for member in self.members.values():
            told = member.other or member.shard
            if told is None or not (member.in_use or member.other is not None):
                continue
            if told.of(called.main) is not None:
                member.shard, member.other, member.in_use = told, None, True
                continue
            member.shard, member.other, member.in_use = None, told, False
            member.why_not = _another_model(member, told, called.main)
            member.lost.set()
            log.error("%s stays out of use: %s", member.transport.address, member.why_not)
        self._resolve()

    def _announce(self) -> None:
        """Wake those who wait for a server to come into use."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _resolve(self) -> None:
        told = self._told()
        # When all servers were replaced at once, what the former ones owned remains known until a new one has answered.
        known = {} if any(shard.of(self._called.main) for _, shard in told) else {self._called.main: self.known}
        for fingerprint in dict.fromkeys(name for _, shard in told for name in shard.fingerprints):
            having = [(member, shard) for member, shard in told if shard.of(fingerprint) is not None]
            servers = of_model([(member.transport.address, shard) for member, shard in having], fingerprint)
            try:
                known[fingerprint] = Known(tuple(member for member, _ in having), resolve_ownership(servers))
            except ModelMismatch as error:
                if fingerprint == self._called.main:
                    raise
                log.error("weights %r are of no use: %s", fingerprint, error)
        self._known = known
        for layer, rows in self.ownership.owned.items():
            owned = rows.any(dim=0)
            self._ever_owned[layer] = self._ever_owned.get(layer, owned) | owned


def _another_model(member: Member, shard: ShardInfo, called: str) -> ModelMismatch:
    return ModelMismatch(
        f"{member.transport.address}: it holds another model, {shard.model_fingerprint!r}; {called!r} is called"
    )
