"""What the calls of one coordinator share: whom they ask, and how much of what they may repeat."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeAlias, TypeVar

from torch import Tensor

from expertd import _native
from expertd.client.call.budget import RetryBudget
from expertd.client.call.choice import Owners, candidates, choose
from expertd.client.call.hedging import Lateness
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.fleet.holdings import Known
from expertd.client.fleet.member import Member
from expertd.client.fleet.membership import Membership
from expertd.client.fleet.ownership import Ownership
from expertd.client.transport.segment import Segment
from expertd.proto.codec import ShardInfo

MOST_PARTS = 1 << 20
"""Of a call, whose requests are numbered one after another."""
MOST_THREADS = 64
"""Calls of many tokens at once; others wait."""
GOLDEN = 0.618034
"""Of a turn: multiples of it spread evenly, however many members there are."""


V = TypeVar("V")
Place: TypeAlias = tuple[str, int]
"""A fingerprint and a layer."""


class Superseded(Exception):
    """The weights that a call has begun with are gone: it begins again with those that are called now."""


class Server(NamedTuple):
    """A member that calls can go straight to."""

    member: Member
    shard: ShardInfo
    segments: tuple[Segment, ...]
    """The memory that is shared with it; without any it gets messages."""
    width: int
    """Of hidden states."""
    owner: _native.Owner


class Caller:
    """What the calls of one coordinator share."""

    def __init__(self, membership: Membership, config: CoordinatorConfig) -> None:
        self.membership = membership
        self.config = config
        self.request_ids = itertools.count(1, MOST_PARTS)
        self.budget = RetryBudget(config.retry_ratio, config.retry_burst)
        self.lateness = None if config.hedge_quantile is None else Lateness(config.hedge_quantile)
        # Coordinators that start together must not all prefer the same one of two idle replicas.
        self._first = random.random()
        self._owners: dict[Place, Owners] = {}
        self._sole: dict[Place, tuple[object, Tensor]] = {}
        """The choice where there is none to make, and what it was made of."""
        self.threads = ThreadPoolExecutor(MOST_THREADS, "expertd-call")
        """On which calls of many tokens are made that an event loop awaits."""
        self._counting = threading.Lock()
        self._servers: dict[tuple[int, str], Server] = {}
        """By number and fingerprint."""

    def choose(self, fingerprint: str, layer: int, tokens: int, avoid: Member | None = None) -> Tensor:
        """[shares, n_routed_experts] int64: number of the member to ask for each expert, or `NOBODY`, for as many
        shares of the `tokens` of a batch. Where one is to `avoid`, it is asked only in need, and there is one share.

        Raises `Superseded` where nobody has weights with this fingerprint any more, and `UnknownExpert` for a layer
        that is on no server.
        """
        members, ownership = self._known(fingerprint)
        if layer not in ownership.owned and not self.membership.holdings.is_called(fingerprint):
            raise Superseded(fingerprint)
        ownership.check_layer(layer)
        place = fingerprint, layer
        if layer in ownership.replicated:
            return self._choose(members, ownership, place, tokens, avoid)
        state = ownership, tuple(member.in_use for member in members)
        made_of, chosen = self._sole.get(place, (None, None))
        if chosen is None or made_of != state:
            chosen = self._choose(members, ownership, place, tokens, avoid)
            self._sole = self._present(self._sole) | {place: (state, chosen)}
        return chosen

    def servers(self, fingerprint: str, width: int) -> list[Server]:
        """Those that calls of hidden size `width` can go straight to: in use, and not full. Raises `Superseded`."""
        members, _ = self._known(fingerprint)
        now = time.monotonic()
        usable = [member for member in members if member.in_use and member.busy_until <= now]
        ready = (self._server(member, fingerprint, width) for member in usable)
        return [server for server in ready if server is not None]

    def chunk_tokens(self, member: Member, width: int) -> int:
        """Of one request to `member`, at most."""
        chunk = self.config.chunk_tokens(width, member.transport.chunk_bytes)
        return min(chunk, member.shard.max_tokens_per_request) if member.shard else chunk

    def count(self, tokens: Iterable[tuple[Member, int]], sign: int) -> None:
        """Tokens that members have now, or with -1 no longer, to compute. Any thread."""
        with self._counting:
            for member, count in tokens:
                member.outstanding_tokens += sign * count

    def _present(self, places: dict[Place, V]) -> dict[Place, V]:
        """Without weights that have gone."""
        return {place: value for place, value in places.items() if self.membership.holdings.known_of(place[0])}

    def _known(self, fingerprint: str) -> Known:
        known = self.membership.holdings.known_of(fingerprint)
        if known is None:
            raise Superseded(fingerprint)
        return known

    def _choose(
        self, members: Sequence[Member], ownership: Ownership, place: Place, tokens: int, avoid: Member | None
    ) -> Tensor:
        # Those with as much to do take turns, which also shows how fast they are.
        self._first = (self._first + GOLDEN) % 1.0
        owners, owned = self._owners.get(place), ownership.owned[place[1]]
        if owners is None or owners.owned is not owned:
            owners = Owners(owned)
            self._owners = self._present(self._owners) | {place: owners}
        known = candidates(members, self.config.locality, time.monotonic())
        draws = self._first, random.random()
        return choose(owners, known, draws, tokens, None if avoid is None else avoid.number)

    def _server(self, member: Member, fingerprint: str, width: int) -> Server | None:
        segments, shard = member.transport.segments, member.shard
        if shard is None or shard.of(fingerprint) is None:
            return None
        server = self._servers.get((member.number, fingerprint))
        if server is None or server.shard is not shard or server.segments is not segments or server.width != width:
            owner = _native.Owner(
                member.number,
                [segment.lane for segment in segments],
                fingerprint,
                shard.placement_epoch,
                self.chunk_tokens(member, width),
                segments[0].reply_room if segments else 0,
                member.transport.checked,
            )
            server = Server(member, shard, segments, width, owner)
            # Without those that have left, and weights that have gone.
            known = {
                (number, weights): one
                for (number, weights), one in self._servers.items()
                if number in self.membership.members and self.membership.holdings.known_of(weights)
            }
            self._servers = known | {(member.number, fingerprint): server}
        return server
