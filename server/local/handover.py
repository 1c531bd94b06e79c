"""How callers hand over memory: a ticket, and the descriptors of a segment and perhaps of GPU memory."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from expertd.proto.base.errors import InvalidBatch
from expertd.proto.lane.layout import GPU_SIZE_BYTES
from expertd.server.rpc.tickets import TICKET_BYTES

HANDOVER_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Handover:
    """What a connection begins with."""

    ticket: bytes
    gpu_bytes: int
    """0: no GPU memory is handed over."""
    descriptors: list[int]


def handover_socket(max_bytes: int, unix_socket: Path | None) -> str | None:
    """Where callers hand over segments: beside the server's unix socket, if it has one; None if no memory is shared."""
    if not max_bytes:
        return None
    return f"@expertd-{secrets.token_hex(8)}" if unix_socket is None else f"{unix_socket}.shm"


async def receive(peer: socket.socket) -> Handover:
    """The ticket and the file descriptors with which a connection begins."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(peer, wake)
    try:
        async with asyncio.timeout(HANDOVER_SECONDS):
            await readable
    except TimeoutError:
        raise InvalidBatch(f"no ticket came within {HANDOVER_SECONDS:g} s") from None
    finally:
        loop.remove_reader(peer)
    try:
        message, descriptors, _, _ = socket.recv_fds(peer, TICKET_BYTES + GPU_SIZE_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise InvalidBatch(f"the ticket cannot be read: {error.strerror}") from None
    if not descriptors:
        raise InvalidBatch("no file descriptor came with the ticket; send them in one message (SCM_RIGHTS)")
    gpu_bytes = int.from_bytes(message[TICKET_BYTES:], "little")
    if (gpu_bytes > 0) != (len(descriptors) == 2):
        for descriptor in descriptors:
            os.close(descriptor)
        raise InvalidBatch(
            f"{len(descriptors)} file descriptors came with {gpu_bytes} bytes of GPU memory;"
            " the second one and the size belong together"
        )
    return Handover(message[:TICKET_BYTES], gpu_bytes, descriptors)
