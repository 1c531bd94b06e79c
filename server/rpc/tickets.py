"""Who may hand over shared memory: callers on this machine that gRPC has let in."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from expertd.proto.base.errors import NotPermitted, Unauthenticated
from expertd.proto.base.loopback import UNIX, check_here
from expertd.proto.codec import Registration
from expertd.proto.lane.layout import LANE_VERSION

log = logging.getLogger(__name__)
TICKET_BYTES = 32
TICKET_SECONDS = 10
MAX_TICKETS, MAX_PEER_TICKETS = 1024, 16
"""Of all callers together, and of one connection. Connections over unix sockets all have one name, and gRPC does not
tell the process at the other end: as one they may have all, more than anybody asks for within a handover."""


@dataclass(frozen=True, slots=True)
class Guest:
    """Who may hand over memory."""

    peer: str
    """As gRPC names it."""
    identity: str
    """As far as it is proven, else empty."""
    of_peer: bool
    """Whether it hands over memory of another GPU than the server's, as it says."""
    expires: float

    @property
    def name(self) -> tuple[str, str]:
        """By which tickets are counted."""
        return self.peer, self.identity


class Tickets:
    """One-time tickets, each for one connection to the socket that takes segments."""

    def __init__(self, name: str | None, gpu: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """`name` is the socket's and `gpu` the GPU's, as in the contract; None: no memory is shared."""
        self._name = name
        self.gpu = gpu
        self._clock = clock
        self._issued: dict[bytes, Guest] = {}
        """The oldest first."""
        self._refused: set[str] = set()

    def _check_here(self, peer: str) -> None:
        """Raise `NotPermitted` for another machine's callers; the log says so once of each host, of the first ones."""
        try:
            check_here(peer)
        except NotPermitted as refusal:
            host = peer.rpartition(":")[0]
            if host not in self._refused and len(self._refused) < MAX_TICKETS:
                self._refused.add(host)
                log.info("no memory is shared, calls come over gRPC: %s", refusal)
            raise

    def issue(self, peer: str, identity: str = "", gpu: str = "") -> Registration:
        """A ticket for `peer`, a caller as gRPC names it, of an `identity` if that is proven, with memory of a `gpu`.

        Raises `NotPermitted`.

        Nobody waits for tickets that others took: when there are too many, whoever has most loses the oldest.
        """
        if self._name is None:
            raise NotPermitted("this server shares no memory; start it with --shared-memory-bytes above 0")
        self._check_here(peer)
        self._forget_old()
        held = Counter(guest.name for guest in self._issued.values())
        if not peer.startswith(UNIX) and held[peer, identity] >= MAX_PEER_TICKETS:
            self._drop_oldest((peer, identity))
        elif len(self._issued) >= MAX_TICKETS:
            self._drop_oldest(max(held, key=lambda name: held[name]))
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._issued[ticket] = Guest(peer, identity, gpu not in ("", self.gpu), self._clock() + TICKET_SECONDS)
        return Registration(
            socket=self._name, ticket=ticket, ticket_seconds=TICKET_SECONDS, gpu=self.gpu, lane_version=LANE_VERSION
        )

    def redeem(self, ticket: bytes) -> Guest:
        """The caller that `ticket` was issued to. Raises `Unauthenticated` for one unknown, used or too old."""
        self._forget_old()
        if ticket not in self._issued:
            raise Unauthenticated("the ticket is unknown, used or too old; ask RegisterSharedMemory for another one")
        return self._issued.pop(ticket)

    def _drop_oldest(self, name: tuple[str, str]) -> None:
        del self._issued[next(ticket for ticket, guest in self._issued.items() if guest.name == name)]

    def _forget_old(self) -> None:
        now = self._clock()
        self._issued = {ticket: guest for ticket, guest in self._issued.items() if guest.expires > now}
