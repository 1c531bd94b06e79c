"""Calls from processes of this machine: a unix socket for the messages, shared memory for the tensors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, InvalidBatch, NotPermitted, Overloaded
from expertd.proto.base.loopback import UNIX
from expertd.proto.lane.frames import MAX_FRAME_BYTES, Frames, check_peer, framed, peer_of, socket_address
from expertd.proto.lane.layout import GPU_SIZE_BYTES, SharedSegment
from expertd.server.local.mapping import check_segment, map_segment, open_gpu_memory, pin, unpin
from expertd.server.rpc.conversation import Conversation
from expertd.server.rpc.tickets import TICKET_BYTES, Tickets
from expertd.server.scheduling.device import DeviceOwner

log = logging.getLogger(__name__)
Respond: TypeAlias = Callable[[bytes, Conversation], Awaitable[bytes | None]]
HANDOVER_SECONDS = 2.0
CLOSE_SECONDS = 1.0
"""For segments to be given back at the end of the server, which a stuck device or a caller can keep from happening."""


class LocalListener:
    """Takes segments from callers that have a ticket, and answers their calls until they close the connection."""

    def __init__(
        self, name: str | None, max_bytes: int, tickets: Tickets, respond: Respond, device: DeviceOwner, *, gpu: bool
    ) -> None:
        """Takes at most `max_bytes` of segments and GPU memory; with a `gpu`, segments are pinned for it.

        `name` is the socket's, as in the contract; with None there is no socket.
        """
        self._name = name
        self._max_bytes = max_bytes
        self._tickets = tickets
        self._respond = respond
        self._device = device
        self._gpu = gpu
        self._connections: set[Connection] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self.mapped_bytes = 0

    def start(self) -> None:
        """Listen. Raises OSError when the name cannot be bound."""
        if self._name is None:
            return
        if not self._name.startswith("@"):
            Path(self._name).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.setblocking(False)
        mask = os.umask(0o177)
        try:
            self._socket.bind(socket_address(self._name))
        finally:
            os.umask(mask)
        self._socket.listen()
        self._accepting = asyncio.create_task(self._accept())

    def disconnect(self) -> None:
        """Close all connections at once, so that no caller uses memory again that the device may still write to."""
        for connection in self._connections:
            connection.frames.close()

    async def stop(self, seconds: float) -> None:
        """Read no more requests, answer those that were read, for at most `seconds`; then close all connections."""
        if self._name is None:
            return
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        self._socket.close()
        if not self._name.startswith("@"):
            Path(self._name).unlink(missing_ok=True)
        for connection in self._connections:
            connection.frames.stop_reading()
        await asyncio.gather(*(connection.answered(seconds) for connection in self._connections))
        for connection in self._connections:
            connection.frames.close()
        if self._serving:
            await asyncio.wait(self._serving, timeout=CLOSE_SECONDS)

    async def _accept(self) -> None:
        while True:
            try:
                peer, _ = await asyncio.get_running_loop().sock_accept(self._socket)
            except OSError as error:
                log.warning("a local connection could not be accepted: %s", error)
                await asyncio.sleep(0.1)
            else:
                task = asyncio.create_task(self._serve(peer))
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)

    async def _serve(self, peer: socket.socket) -> None:
        """The life of one connection."""
        try:
            check_peer(peer)
            caller, memory = await self._take_memory(peer)
        except ExpertdError as error:
            log.warning("a segment was refused: %s", error)
            with peer, contextlib.suppress(OSError):
                peer.send(framed(codec.encode_error(0, error)))
            return
        conversation = Conversation(caller, memory.segment)
        connection = Connection(lambda message: self._respond(message, conversation))
        self._connections.add(connection)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection.frames, peer)
            connection.frames.send(b"")  # A response without an error.
            await connection.ended
        finally:
            self._connections.discard(connection)
            await connection.answered()
            if memory.release is not None:
                await self._device.call(memory.release)
            self.mapped_bytes -= memory.num_bytes

    async def _take_memory(self, peer: socket.socket) -> tuple[str, _Memory]:
        """Who hands over a segment, and the segment, mapped."""
        handover = await _receive(peer)
        try:
            caller = self._tickets.redeem(handover.ticket)
            if caller.startswith(UNIX):
                # Connections over a unix socket have no names to tell callers apart by.
                caller = f"{caller} process {peer_of(peer)[0]}"
            if handover.gpu_bytes and not self._gpu:
                raise NotPermitted("this server computes on no GPU; hand over the segment alone")
            num_bytes = check_segment(handover.descriptors[0]) + handover.gpu_bytes
            room = self._max_bytes - self.mapped_bytes
            if num_bytes > room:
                raise Overloaded(f"the segment has {num_bytes} bytes; {room} are left of --shared-memory-bytes")
            self.mapped_bytes += num_bytes
            try:
                return caller, await self._map(handover, num_bytes)
            except BaseException:
                self.mapped_bytes -= num_bytes
                raise
        finally:
            for descriptor in handover.descriptors:
                os.close(descriptor)

    async def _map(self, handover: _Handover, num_bytes: int) -> _Memory:
        gpu_bytes = handover.gpu_bytes
        memory = await asyncio.to_thread(map_segment, handover.descriptors[0], num_bytes - gpu_bytes)
        if gpu_bytes:
            # Not pinned: what the GPU would copy from the segment is in its own memory.
            gpu = await self._device.call(partial(open_gpu_memory, handover.descriptors[1], gpu_bytes))
            return _Memory(SharedSegment(memory, gpu.tensor(0, gpu.size)), num_bytes, gpu.close)
        if self._gpu:
            await self._device.call(partial(pin, memory))
            return _Memory(SharedSegment(memory), num_bytes, partial(unpin, memory))
        return _Memory(SharedSegment(memory), num_bytes, None)


@dataclass(frozen=True, slots=True)
class _Handover:
    """What a connection begins with."""

    ticket: bytes
    gpu_bytes: int
    """0: no GPU memory is handed over."""
    descriptors: list[int]


@dataclass(frozen=True, slots=True)
class _Memory:
    """What one connection's caller shares."""

    segment: SharedSegment
    num_bytes: int
    release: Callable[[], object] | None
    """To be called on the device thread before it is unmapped."""


class Connection:
    """The calls in flight of one connection."""

    def __init__(
        self, respond: Callable[[bytes], Awaitable[bytes | None]], max_frame_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        self._respond = respond
        self._answers: set[asyncio.Task[None]] = set()
        self.frames = Frames(self._start, self._end, max_frame_bytes)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def answered(self, timeout: float | None = None) -> None:
        """Wait until every request that was read has its answer, or is dropped and the device done with it."""
        if self._answers:
            await asyncio.wait(self._answers, timeout=timeout)

    def _start(self, request: bytes) -> None:
        task = asyncio.create_task(self._answer(request))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, request: bytes) -> None:
        response = await self._respond(request)
        if response is not None:
            self.frames.send(response)

    def _end(self, error: Exception | None) -> None:
        if isinstance(error, InvalidBatch):
            self.frames.send(codec.encode_error(0, error))
        for task in self._answers:
            task.cancel()
        self.ended.set_result(None)


def handover_socket(max_bytes: int, unix_socket: Path | None) -> str | None:
    """Where callers hand over segments: beside the server's unix socket, if it has one; None if no memory is shared."""
    if not max_bytes:
        return None
    return f"@expertd-{secrets.token_hex(8)}" if unix_socket is None else f"{unix_socket}.shm"


async def _receive(peer: socket.socket) -> _Handover:
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
    return _Handover(message[:TICKET_BYTES], gpu_bytes, descriptors)
