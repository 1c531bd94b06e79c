"""Whether an address can be listened on."""

from __future__ import annotations

import socket

from expertd.server.options.config import Address


def obstacle_to_bind(address: Address) -> str | None:
    """Why it cannot be bound now; None when it can."""
    try:
        family, kind, protocol, _, resolved = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(resolved)
    except OSError as error:
        return error.strerror or str(error)
    return None
