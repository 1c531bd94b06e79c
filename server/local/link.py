"""What a front end and its server say to each other, over a socket pair."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from dataclasses import dataclass

from expertd.proto import codec
from expertd.proto.base.errors import Unavailable
from expertd.proto.lane.frames import AnswerFrames
from expertd.server.options.config import Address, ServerConfig

CALL = struct.Struct("<QH")
"""Before every message to the server: the call's number and the length of the names of the connection and, in a line of
its own, of who has it, which come next. What comes again under a number, without names, cancels that call, if it is not
answered by then."""
ANSWER = struct.Struct("<Q")
"""Before every message of the server: the call's number."""
CONTROL = 0
"""The number of what is no call: that the front end listens, or to the other side that it is to drain."""
LOST_SECONDS = 0.5
"""For callers to be told that the server is gone, before their connections end."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a front end is told when it starts."""

    config: ServerConfig
    listen: Address
    """Where all front ends listen."""
    server: str
    """Path of the unix socket where the server answers everything but `Execute` and `ExecuteStream`."""
    max_message_bytes: int

    @property
    def max_frame_bytes(self) -> int:
        """Of a whole message with what goes before it."""
        return self.max_message_bytes + codec.ENVELOPE_BYTES


class ServerLink:
    """A front end's end."""

    def __init__(self, settings: Settings) -> None:
        self._numbers = itertools.count(CONTROL + 1)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._frames = AnswerFrames(self._on_frame, self._on_end, settings.max_frame_bytes)
        self.draining: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        """Seconds to drain, once the server says so or is gone."""
        self.lost = False

    async def open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: self._frames, sock=connection)

    def say_listening(self) -> None:
        self._send(CONTROL)

    def call(self, message: bytes, caller: str, identity: str) -> tuple[int, asyncio.Future[bytes]]:
        """The number and the response of a call: the server's, or the error that it answers with, or `Unavailable`."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        number = next(self._numbers)
        if self.lost:
            future.set_exception(_gone())
        else:
            self._waiting[number] = future
            self._send(number, f"{caller}\n{identity}".encode(), message)
        return number, future

    def cancel(self, number: int) -> None:
        if number in self._waiting:
            self._send(number)

    def _send(self, number: int, names: bytes = b"", message: bytes = b"") -> None:
        self._frames.send(CALL.pack(number, len(names)) + names + message)

    def _on_frame(self, frame: bytes) -> None:
        (number,), message = ANSWER.unpack_from(frame), frame[ANSWER.size :]
        if number == CONTROL:
            self._drain(float(message))
            return
        future = self._waiting.pop(number, None)
        if future is None:
            return
        error = codec.parse_response(message).error
        if error is None:
            future.set_result(message)
        else:
            future.set_exception(codec.read_error(error))

    def _on_end(self, error: Exception | None) -> None:
        self.lost = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_gone())
        self._drain(LOST_SECONDS)

    def _drain(self, seconds: float) -> None:
        if not self.draining.done():
            self.draining.set_result(seconds)


def _gone() -> Unavailable:
    return Unavailable("the connection between front end and server was closed; use another replica or retry")
