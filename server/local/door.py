"""Calls from processes of this machine: a unix socket for the messages, shared memory for the tensors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, NotPermitted, Overloaded
from expertd.proto.base.loopback import UNIX
from expertd.proto.base.tasks import Tasks
from expertd.proto.lane.frames import check_peer, framed, peer_of, socket_address
from expertd.proto.lane.layout import SharedSegment
from expertd.server.local.connection import Connection
from expertd.server.local.gpu import Gpu, Release
from expertd.server.local.handover import Handover, receive
from expertd.server.local.mapping import check_segment, map_segment
from expertd.server.options.config import InvalidOption
from expertd.server.rpc.conversation import Conversation
from expertd.server.rpc.incoming import Executor
from expertd.server.rpc.tickets import Tickets

log = logging.getLogger(__name__)
CLOSE_SECONDS = 1.0
"""For memory to be given back at the end of the server, which a stuck device or a caller can keep from happening."""


class LocalDoor:
    """Takes segments from callers that have a ticket, and answers their calls until they close the connection."""

    def __init__(
        self,
        name: str,
        max_bytes: int,
        tickets: Tickets,
        executor: Executor,
        gpu: Gpu,
        new_tasks: Callable[[], Tasks],
    ) -> None:
        """Takes at most `max_bytes` of segments and GPU memory. `name` is the socket's, as in the contract."""
        self._name = name
        self._max_bytes = max_bytes
        self._tickets = tickets
        self._executor = executor
        self.gpu = gpu
        self._connections: set[Connection] = set()
        self._new_tasks = new_tasks
        self._tasks = new_tasks()
        self.mapped_bytes = 0

    async def listen(self) -> None:
        self._forget_path()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.setblocking(False)
        mask = os.umask(0o177)
        try:
            self._socket.bind(socket_address(self._name))
        except OSError as error:
            raise InvalidOption(f"--unix-socket {self._name} cannot be bound: {error}") from None
        finally:
            os.umask(mask)
        self._socket.listen()
        self._accepting = self._tasks.keep(self._accept, "accepting local connections")

    async def until_listening(self) -> None: ...

    def disconnect(self) -> None:
        for connection in self._connections:
            connection.frames.close()

    async def drain(self, seconds: float) -> None:
        """Close all connections then."""
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        self._socket.close()
        self._forget_path()
        for connection in self._connections:
            connection.frames.stop_reading()
        await asyncio.gather(*(connection.idle(seconds) for connection in self._connections))
        self.disconnect()

    async def close(self) -> None:
        await self._tasks.settle(CLOSE_SECONDS)

    def _forget_path(self) -> None:
        """Names in the abstract namespace end with their socket; paths stay."""
        if not self._name.startswith("@"):
            Path(self._name).unlink(missing_ok=True)

    async def _accept(self) -> None:
        while True:
            try:
                peer, _ = await asyncio.get_running_loop().sock_accept(self._socket)
            except OSError as error:
                log.warning("a local connection could not be accepted: %s", error)
                await asyncio.sleep(0.1)
            else:
                self._tasks.start(self._serve(peer), "serving a local connection")

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
        connection = Connection(Conversation(caller, self._executor, memory.segment).respond, self._new_tasks())
        self._connections.add(connection)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection.frames, peer)
            connection.frames.send(b"")  # A response without an error.
            await connection.ended
        finally:
            self._connections.discard(connection)
            await connection.idle()
            await self.gpu.release(memory.release)
            self.mapped_bytes -= memory.num_bytes

    async def _take_memory(self, peer: socket.socket) -> tuple[str, _Memory]:
        """Who hands over a segment, and the segment, mapped."""
        handover = await receive(peer)
        try:
            caller = self._tickets.redeem(handover.ticket)
            if caller.startswith(UNIX):
                # Connections over a unix socket have no names to tell callers apart by.
                caller = f"{caller} process {peer_of(peer)[0]}"
            if handover.gpu_bytes and not self.gpu.present:
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

    async def _map(self, handover: Handover, num_bytes: int) -> _Memory:
        gpu_bytes = handover.gpu_bytes
        memory = await asyncio.to_thread(map_segment, handover.descriptors[0], num_bytes - gpu_bytes)
        if not gpu_bytes:
            return _Memory(SharedSegment(memory), num_bytes, await self.gpu.pin(memory))
        # Not pinned: what the GPU would copy from the segment is in its own memory.
        on_gpu = await self.gpu.open(handover.descriptors[1], gpu_bytes)
        return _Memory(SharedSegment(memory, on_gpu.tensor(0, on_gpu.size)), num_bytes, on_gpu.close)


@dataclass(frozen=True, slots=True)
class _Memory:
    """What one connection's caller shares."""

    segment: SharedSegment
    num_bytes: int
    release: Release | None
