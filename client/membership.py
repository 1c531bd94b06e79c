"""The servers of a coordinator: which are alive, what they own now, and how busy they are."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from expertd.client.ownership import Ownership, check_complete, resolve_ownership
from expertd.client.transport import Transport
from expertd.kernels.config import InvalidConfig
from expertd.proto.codec import ShardInfo
from expertd.proto.errors import (
    DeadlineExceeded,
    ExpertdError,
    ModelMismatch,
    ServerFault,
    StalePlacement,
    Unavailable,
    UnknownExpert,
)

log = logging.getLogger(__name__)
PROBE_SECONDS = 0.25
"""Between two looks at a server that failed."""
PROBE_TIMEOUT = 2.0
AVOIDED = 1e12
"""Load in tokens that stands for 'only if nobody else has the expert'."""
LOST = (Unavailable, DeadlineExceeded, ServerFault, StalePlacement, UnknownExpert, ModelMismatch)
"""Errors after which a server is not used until it has answered a probe."""


@dataclass(slots=True, eq=False)
class Member:
    """One server."""

    index: int
    transport: Transport
    shard: ShardInfo | None = None
    """What it owns; None while it is out of use."""
    outstanding_tokens: int = 0
    probe: asyncio.Task[None] | None = None


class Membership:
    """Finds out what servers own, takes those that fail out of use and probes them until they return."""

    def __init__(self, transports: Sequence[Transport]) -> None:
        self.members = tuple(Member(index, transport) for index, transport in enumerate(transports))
        self._ownership: Ownership | None = None
        # Coordinators that start together must not all prefer the same one of two idle replicas.
        self._first = random.randrange(len(self.members))

    @property
    def ownership(self) -> Ownership:
        """Raises `RuntimeError` before `connect` and after `close`."""
        if self._ownership is None:
            raise RuntimeError("the coordinator is not connected; use it in 'async with Coordinator(...) as moe:'")
        return self._ownership

    @property
    def connected(self) -> bool:
        return self._ownership is not None

    async def connect(self, timeout: float) -> None:
        """Ask every server, for at most `timeout` seconds; those that do not answer are probed from then on.

        Raises the first error when no server answers, and `UnknownExpert` when an expert is left without an owner.
        """
        asked = (member.transport.get_shard(timeout) for member in self.members)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        for member, answer in zip(self.members, answers, strict=True):
            member.shard = None if isinstance(answer, BaseException) else answer
        if len(errors) == len(answers):
            raise errors[0]
        ownership = self._resolve()
        try:
            check_complete(ownership)
        except UnknownExpert as missing:
            unreachable = "".join(f"; {error}" for error in errors)
            raise UnknownExpert(f"{missing}{unreachable}") from None
        self._ownership = ownership
        for member in self.members:
            if member.shard is None:
                self._start_probe(member)

    async def close(self) -> None:
        self._ownership = None
        probes = [member.probe for member in self.members if member.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        await asyncio.gather(*(member.transport.close() for member in self.members))

    def owners(self, layer: int, avoid: Member | None = None) -> Tensor:
        """[n_routed_experts] int64: the member to ask for each expert, the least busy one; `avoid` only in need."""
        count = len(self.members)
        loads = [
            math.inf
            if member.shard is None
            else member.outstanding_tokens
            + ((member.index - self._first) % count) / count
            + (AVOIDED if member is avoid else 0.0)
            for member in self.members
        ]
        return self.ownership.choose(layer, loads)

    def report(self, member: Member, error: ExpertdError) -> None:
        """Tell that a call to `member` failed; it is taken out of use unless it is only busy."""
        if isinstance(error, LOST) and member.shard is not None and self.connected:
            log.warning("%s is out of use: %s", member.transport.address, error)
            member.shard = None
            self._start_probe(member)

    def _start_probe(self, member: Member) -> None:
        member.probe = asyncio.create_task(self._probe(member))

    async def _probe(self, member: Member) -> None:
        """Ask until the server answers with a shard of this model, then use it again, with what it owns by then."""
        while True:
            try:
                shard = await member.transport.get_shard(PROBE_TIMEOUT)
                if shard.model_fingerprint != self.ownership.model_fingerprint:
                    raise ModelMismatch(f"it holds another model, {shard.model_fingerprint!r}")
                member.shard = shard
                self._ownership = self._resolve()
            except (ExpertdError, InvalidConfig) as error:
                log.debug("%s is still out of use: %s", member.transport.address, error)
                await asyncio.sleep(PROBE_SECONDS * random.uniform(0.5, 1.5))
            else:
                log.warning("%s is back in use", member.transport.address)
                return

    def _resolve(self) -> Ownership:
        names = [member.transport.address for member in self.members]
        return resolve_ownership(names, [member.shard for member in self.members])
