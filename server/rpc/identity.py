"""Who calls: by identities, not by connections, callers share what a server has."""

from __future__ import annotations

import hashlib
import os
from typing import Any, TypeAlias

import grpc.aio

from expertd.proto.base.loopback import UNIX

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class Identities:
    """Tells callers over gRPC apart: by what they prove, or else by where they are."""

    def __init__(self, *, by_token: bool) -> None:
        """`by_token`: calls have been let in by their bearer tokens."""
        self._by_token = by_token

    def proven(self, context: Context) -> str:
        """By token or certificate; empty for a caller that has shown neither."""
        if self._by_token:
            for key, value in context.invocation_metadata() or ():
                if key == "authorization":
                    token = (value if isinstance(value, bytes) else value.encode()).partition(b" ")[2].strip()
                    # The token itself is for nobody to read.
                    return f"token {hashlib.sha256(token).hexdigest()}"
        names = context.peer_identities()
        return f"certificate {list(names)}" if names else ""

    def of(self, context: Context) -> str:
        """As far as it is proven, else the address, or on a unix socket the user whose alone that is."""
        return self.proven(context) or address_of(context.peer())


def address_of(peer: str) -> str:
    """A caller, as gRPC names it, without its port."""
    return user(os.geteuid()) if peer.startswith(UNIX) else peer.rpartition(":")[0]


def user(number: int) -> str:
    """A process of this machine, by the user that it runs as."""
    return f"user {number}"
