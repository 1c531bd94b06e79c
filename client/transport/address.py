"""Addresses of servers, as people write them."""

from __future__ import annotations

from expertd.proto.base.loopback import UNIX


def check_address(name: str, address: object) -> str:
    """`address`, which is `host:port` or `unix:PATH`. Raises `ValueError`, or `TypeError`, saying what to give."""
    if not isinstance(address, str):
        raise TypeError(f"{name} has {address!r}, a {type(address).__name__}; give a str, such as 'node0:50051'")
    if address.startswith(UNIX) and len(address) > len(UNIX):
        return address
    if "://" in address:
        bare = address.partition("://")[2].strip("/") or "node0:50051"
        raise ValueError(f"{name} has {address!r}, a URL; give host:port, such as {bare!r}")
    host, _, port = address.rpartition(":")
    if not host and ":" not in address:
        raise ValueError(f"{name} has {address!r}, without a port; give host:port, such as {f'{address}:50051'!r}")
    if not (host and port.isdecimal() and 0 < int(port) < 65536) or "/" in host or (":" in host and host[0] != "["):
        raise ValueError(f"{name} has {address!r}, which is not host:port (IPv6 hosts in brackets) or unix:PATH")
    return address
