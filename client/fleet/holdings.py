"""What the servers of a coordinator hold: who owns what of which weights, and which of these calls use."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from expertd.client.fleet.member import Member
from expertd.client.fleet.models import Called, choose_generation, choose_model, is_complete, of_model
from expertd.client.fleet.ownership import Ownership, check_replicas, resolve_ownership
from expertd.proto.base.errors import ModelMismatch
from expertd.proto.codec import ShardInfo

log = logging.getLogger(__name__)


class Known(NamedTuple):
    """What is known of the servers with certain weights."""

    members: tuple[Member, ...]
    ownership: Ownership
    """Its rows are those of `members`."""


class Holdings:
    """What members told, made into owners. Who tells something new has it resolved again."""

    def __init__(self, members: Mapping[int, Member], *, model_fingerprint: str | None, locality: str) -> None:
        """Of `members`, as they are at any time; the rest as `Membership` has it."""
        self._members = members
        self._pinned = model_fingerprint
        self._locality = locality
        self._called = Called("")
        self._known: dict[str, Known] = {}
        self._ever_owned: dict[int, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether anything is known, as between connecting and closing. Any thread."""
        return bool(self._known)

    @property
    def known(self) -> Known:
        """Of the weights that most calls use. Any thread.

        Raises `RuntimeError` before connecting and after closing.
        """
        known = self._known.get(self._called.main)
        if known is None:
            raise RuntimeError("the coordinator is not connected; use it in 'async with Coordinator(...) as moe:'")
        return known

    @property
    def ownership(self) -> Ownership:
        """See `known`."""
        return self.known.ownership

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

    def count_ownerless(self) -> int:
        """Experts, counted in each layer, that had an owner since connecting and have none in use. Any thread."""
        if not self:
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
        if not self:
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

    def standings(self) -> Counter[str]:
        """How many servers there are of each standing. Any thread."""
        return Counter(member.standing for member in tuple(self._members.values()))

    def suffice(self) -> bool:
        """Whether what servers told makes up a model, and no other than would be called in the end."""
        told = [(member.transport.address, shard) for member, shard in self._told()]
        models = {shard.model_fingerprint for _, shard in told}
        if self._pinned is not None:
            models = {self._pinned}
        return len(models) == 1 and is_complete(of_model(told, models.pop()))

    def begin(self) -> None:
        """Call what the members that told something hold, of which there is one at least. Raises `ModelMismatch`."""
        told = self._told()
        servers = [(member.transport.address, shard) for member, shard in told]
        main = choose_model(servers, self._pinned)
        for member, _ in told:
            member.in_use = True
        self._adopt(choose_generation(servers, main) if self._pinned is None else Called(main))

    def forget(self) -> None:
        """Know nothing any more."""
        self._known = {}

    def check(self, member: Member, shard: ShardInfo) -> None:
        """Raise `ModelMismatch` where `member`, which tells that it has `shard`, cannot serve beside those in use."""
        main = self._called.main
        ours = shard.of(main)
        if ours is None:
            member.other = shard
            raise _another_model(member, shard, main)
        others = [(one.transport.address, told) for one, told in self._told() if one is not member]
        check_replicas([*of_model(others, main), (member.transport.address, ours)], self.ownership.config)

    def steer(self, member: Member, shard: ShardInfo) -> bool:
        """Call other weights of the same shape where servers want that, `member` with what it tells among them.

        Whether others than before are called now, and other servers with them.
        """
        if self._pinned is not None:
            return False
        alive = [(one, one.other or one.shard) for one in self._members.values() if one.in_use or one.other is not None]
        told = [(one.transport.address, known) for one, known in alive if one is not member and known is not None]
        told.append((member.transport.address, shard))
        called = choose_generation(told, self._called.main)
        if called.main != self._called.main:
            if resolve_ownership(of_model(told, called.main)).config != self.ownership.config:
                return False
            log.warning("the servers want weights %r to be used now", called.main)
            # Until it is adopted: it is there, whatever it has.
            member.other = shard
            self._adopt(called)
            return True
        if called != self._called:
            log.info("%g of the calls use weights %r", called.share, called.other or called.main)
            self._called = called
        return False

    def resolve(self) -> None:
        """Find the owners again, after a member came, went or told something else."""
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

    def _told(self) -> list[tuple[Member, ShardInfo]]:
        return [(member, member.shard) for member in self._members.values() if member.shard is not None]

    def _adopt(self, called: Called) -> None:
        """Use the servers that can be reached and have these weights, and no others."""
        self._called = called
        for member in self._members.values():
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
        self.resolve()


def _another_model(member: Member, shard: ShardInfo, called: str) -> ModelMismatch:
    return ModelMismatch(
        f"{member.transport.address}: it holds another model, {shard.model_fingerprint!r}; {called!r} is called"
    )
