"""Messages over a stream socket between processes of one machine: each after its length."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import cast

from expertd.proto.base.errors import InvalidBatch, NotPermitted

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 64 * 1024
"""More than any message without tensors."""


class Frames(asyncio.Protocol):
    """One end of a connection. Callbacks run on the event loop; `on_end` is called once, after the last `on_frame`."""

    def __init__(
        self,
        on_frame: Callable[[bytes], None],
        on_end: Callable[[Exception | None], None],
        max_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        """Frames of more than `max_bytes` are an error.

        `on_end` gets what went wrong, or None when either end closed; it may still `send` what explains an error.
        """
        self._on_frame = on_frame
        self._on_end = on_end
        self._max_bytes = max_bytes
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._ended = False

    def send(self, message: bytes) -> None:
        """Queue a message; without effect once the connection has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(framed(message))

    def stop_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def close(self) -> None:
        """Close once everything sent is written."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        while len(received) >= LENGTH_BYTES and not self._ended:
            length = int.from_bytes(received[:LENGTH_BYTES], "little")
            if length > self._max_bytes:
                self._end(InvalidBatch(f"a frame has {length} bytes; at most {self._max_bytes} are read"))
                self.close()
                return
            end = LENGTH_BYTES + length
            if len(received) < end:
                return
            message = bytes(received[LENGTH_BYTES:end])
            del received[:end]
            self._on_frame(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error)

    # A peer that does not read its answers is not read from either.
    def pause_writing(self) -> None:
        self.stop_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _end(self, error: Exception | None) -> None:
        if not self._ended:
            self._ended = True
            self._on_end(error)
            # They may refer back here: what they hold is to be freed at once, not when the garbage collector comes.
            del self._on_frame, self._on_end


class AnswerFrames(Frames):
    """The end that asks. It reads answers even while its requests are not taken.

    Of two ends that both wait for the other to read, neither would ever go on.
    """

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...


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
