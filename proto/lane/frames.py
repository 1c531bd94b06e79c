"""Unix sockets between processes of one machine: messages, each after its length, and who is at the other end."""

from __future__ import annotations

import os
import socket
import struct

from expertd.proto.base.errors import NotPermitted

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 64 * 1024
"""More than any message without tensors."""


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(LENGTH_BYTES, "little") + message


def socket_address(name: str) -> str:
    """What to bind or connect a unix socket to; a leading @ stands for the abstract namespace."""
    return f"\0{name[1:]}" if name.startswith("@") else name


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Process and user id of whoever is at the other end of a unix socket."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


def check_peer(connection: socket.socket) -> None:
    """Raise `NotPermitted` unless the process at the other end runs as this user or as root."""
    pid, uid = peer_of(connection)
    if uid not in (0, os.geteuid()):
        raise NotPermitted(f"process {pid} runs as user {uid}; memory is shared with user {os.geteuid()} alone")
