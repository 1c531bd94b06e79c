"""Which hosts and addresses are this machine's."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import unquote

from expertd.proto.base.errors import NotPermitted

UNIX = "unix:"
"""Before the path, in addresses of unix sockets."""


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address without a port, is the loopback for certain; names are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def stays_here(address: str) -> bool:
    """Whether what is sent to `address` (host:port or unix:PATH) never leaves this machine, for certain."""
    return address.startswith(UNIX) or is_loopback(address.rpartition(":")[0])


def check_here(peer: str) -> None:
    """Raise `NotPermitted` for a caller on another machine."""
    if not is_here(peer):
        raise NotPermitted(
            f"{peer} is not on this server's machine; only callers that are can share memory. Containers of one"
            " machine, in networks of their own, can over a --unix-socket in a volume of both: docs/deployment.md"
        )


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
