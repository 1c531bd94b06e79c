"""Who may hand over shared memory: callers on this machine that gRPC has let in."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import time
from urllib.parse import unquote

from expertd.proto.base.errors import NotPermitted, Unauthenticated
from expertd.proto.base.loopback import UNIX
from expertd.proto.codec import Registration

TICKET_BYTES = 32
TICKET_SECONDS = 10
MAX_TICKETS = 1024


class Tickets:
    """One-time tickets, each for one connection to the socket that takes segments."""

    def __init__(self, name: str | None, gpu: str = "") -> None:
        """`name` is the socket's and `gpu` the GPU's, as in the contract; None: no memory is shared."""
        self._name = name
        self._gpu = gpu
        self._issued: dict[bytes, tuple[str, float]] = {}

    def issue(self, peer: str) -> Registration:
        """A ticket for `peer`, a caller as gRPC names it. Raises `NotPermitted`."""
        if self._name is None:
            raise NotPermitted("this server shares no memory; start it with --shared-memory-bytes above 0")
        check_here(peer)
        self._forget_old()
        if len(self._issued) >= MAX_TICKETS:
            raise NotPermitted(f"{MAX_TICKETS} tickets wait to be used; ask again in {TICKET_SECONDS} s")
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._issued[ticket] = (peer, time.monotonic() + TICKET_SECONDS)
        return Registration(socket=self._name, ticket=ticket, ticket_seconds=TICKET_SECONDS, gpu=self._gpu)

    def redeem(self, ticket: bytes) -> str:
        """The caller that `ticket` was issued to. Raises `Unauthenticated` for one unknown, used or too old."""
        self._forget_old()
        if ticket not in self._issued:
            raise Unauthenticated("the ticket is unknown, used or too old; ask RegisterSharedMemory for another one")
        return self._issued.pop(ticket)[0]

    def _forget_old(self) -> None:
        now = time.monotonic()
        self._issued = {ticket: (peer, expires) for ticket, (peer, expires) in self._issued.items() if expires > now}


def check_here(peer: str) -> None:
    """Raise `NotPermitted` for a caller on another machine."""
    if not is_here(peer):
        raise NotPermitted(f"{peer} is not on this server's machine; only callers that are can share memory")


def is_here(peer: str) -> bool:
    """Whether a caller, as gRPC names it (ipv4:1.2.3.4:5, ipv6:[::1]:5 or unix:), has an address of this machine."""
    kind, _, address = unquote(peer).partition(":")
    if f"{kind}:" == UNIX:
        return True
    try:
        host = ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    with socket.socket(socket.AF_INET if host.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            # Only addresses of this machine can be bound.
            probe.bind((str(host), 0))
        except OSError:
            return False
    return True
