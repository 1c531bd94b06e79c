"""How memory is handed over to a server: it accepts it, or says why not."""

from __future__ import annotations

import asyncio
import socket

from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, ServerFault, Unavailable
from expertd.proto.lane.frames import LENGTH_BYTES, MAX_FRAME_BYTES, check_peer, socket_address


async def hand_over(address: str, name: str, ticket: bytes, descriptors: list[int]) -> socket.socket:
    """A connection on which the server has accepted the memory. Raises OSError or an `ExpertdError`."""
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, socket_address(name))
        check_peer(connection)
        socket.send_fds(connection, [ticket], descriptors)
        length = int.from_bytes(await _receive(address, connection, LENGTH_BYTES), "little")
        if length > MAX_FRAME_BYTES:
            raise ServerFault(f"{address}: the answer to the handover has {length} bytes")
        error = error_in(address, await _receive(address, connection, length))
        if error is not None:
            raise error
    except BaseException:
        connection.close()
        raise
    return connection


async def _receive(address: str, connection: socket.socket, length: int) -> bytes:
    """So many bytes and no more: what comes next is the lane's."""
    received = b""
    while len(received) < length:
        part = await asyncio.get_running_loop().sock_recv(connection, length - len(received))
        if not part:
            raise closed(address)
        received += part
    return received


def error_in(address: str, message: bytes) -> ExpertdError | None:
    """The error of an ExecuteResponse; raises `ServerFault` for what is none."""
    error = codec.parse_response(message).error
    return None if error is None else codec.read_error(error).again(f"{address}: ")


def closed(address: str) -> Unavailable:
    return Unavailable(f"{address}: the connection of shared memory was closed")
