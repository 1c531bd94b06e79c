"""What a front end and its server say to each other: a socket pair for the messages, shared memory for the tensors."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import socket
import struct
from dataclasses import dataclass, replace

from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, Unavailable
from expertd.proto.codec import EMPTY, RawRequest
from expertd.proto.lane.frames import AnswerFrames
from expertd.proto.lane.free_list import FreeList
from expertd.proto.lane.layout import Layout, aligned
from expertd.server.options.config import Address, ServerConfig

CALL = struct.Struct("<Q?H")
"""Before every message to the server: the call's number, whether its tensors are in shared memory, and the length of
the caller's name, which comes next. What comes again under a number cancels that call."""
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
    hidden_size: int
    max_message_bytes: int

    @property
    def max_frame_bytes(self) -> int:
        """Of a whole message with what goes before it."""
        return self.max_message_bytes + codec.ENVELOPE_BYTES


class ServerLink:
    """A front end's end. Tensors for which there is no room in the shared memory go with the message."""

    def __init__(self, memory: mmap.mmap, settings: Settings) -> None:
        self._memory = memoryview(memory)
        self._width = settings.hidden_size
        self._free = FreeList(len(memory))
        self._numbers = itertools.count(CONTROL + 1)
        self._waiting: dict[int, tuple[asyncio.Future[bytes], _Slot | None]] = {}
        self._frames = AnswerFrames(self._on_frame, self._on_end, settings.max_frame_bytes)
        self.draining: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        """Seconds to drain, once the server says so or is gone."""
        self.lost = False

    async def open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        await asyncio.get_running_loop().create_unix_connection(lambda: self._frames, sock=connection)

    def say_listening(self) -> None:
        self._send(CONTROL, False, "", b"")

    async def call(self, request: RawRequest, caller: str) -> bytes:
        """The response to `request`. Raises the error that the server answers with, or `Unavailable`."""
        if self.lost:
            raise _gone()
        number, slot = next(self._numbers), self._place(request)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        # Kept until the server has answered even if nobody waits any more: the slot is the server's so long.
        self._waiting[number] = future, slot
        if slot is not None:
            request = replace(
                request, hidden=EMPTY, hidden_scales=EMPTY, expert_ids=EMPTY, weights=EMPTY, segment_offset=slot.offset
            )
        self._send(number, slot is not None, caller, codec.encode_request(request))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            self._send(number, False, "", codec.encode_cancellation(request.request_id))
            # Its answer comes at once or when the device is done with it, as it would without front ends.
            await asyncio.wait((future,))
            # An error in it is nobody's: asyncio is not to complain of it.
            future.exception()
            raise

    def _place(self, request: RawRequest) -> _Slot | None:
        """Copy the tensors of `request` to shared memory; None when there is no room, or it is to be refused."""
        layout = codec.segment_layout(request, self._width)
        offset = None if layout is None else self._free.take(aligned(layout.end))
        if layout is None or offset is None:
            return None
        memory = self._memory[offset : offset + layout.end]
        memory[layout.hidden] = request.hidden
        memory[layout.hidden_scales] = request.hidden_scales
        memory[layout.expert_ids] = request.expert_ids
        memory[layout.weights] = request.weights
        return _Slot(offset, layout, memory)

    def _send(self, number: int, shared: bool, caller: str, message: bytes) -> None:
        name = caller.encode()
        self._frames.send(CALL.pack(number, shared, len(name)) + name + message)

    def _on_frame(self, frame: bytes) -> None:
        (number,), message = ANSWER.unpack_from(frame), frame[ANSWER.size :]
        if number == CONTROL:
            self._drain(float(message))
            return
        future, slot = self._waiting.pop(number)
        try:
            if not future.done():
                future.set_result(_complete(message, slot))
        except ExpertdError as error:
            future.set_exception(error)
        if slot is not None:
            self._free.give_back(slot.offset, aligned(slot.layout.end))

    def _on_end(self, error: Exception | None) -> None:
        self.lost = True
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(_gone())
        self._drain(LOST_SECONDS)

    def _drain(self, seconds: float) -> None:
        if not self.draining.done():
            self.draining.set_result(seconds)


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one call's tensors are in the shared memory."""

    offset: int
    layout: Layout
    memory: memoryview


def _complete(message: bytes, slot: _Slot | None) -> bytes:
    """The response `message`, with the partials in `slot`. Raises the error in it."""
    response = codec.parse_response(message)
    if response.error is not None:
        raise codec.read_error(response.error)
    if slot is None:
        return message
    return codec.add_partials(message, response.request_id, slot.memory[slot.layout.partials])


def _gone() -> Unavailable:
    return Unavailable("the connection between front end and server was closed; use another replica or retry")
