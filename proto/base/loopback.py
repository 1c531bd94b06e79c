"""Which hosts and addresses never leave this machine."""

from __future__ import annotations

import ipaddress

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
