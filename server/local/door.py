"""Calls from processes of this machine: a unix socket to hand over memory, in which the engine serves their lanes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from expertd._native import Engine, Mapping
from expertd.kernels.memory.gpu import GpuMemory
from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, InvalidBatch
from expertd.proto.base.loopback import UNIX
from expertd.proto.base.tasks import Tasks
from expertd.proto.lane.frames import check_peer, framed, peer_of, socket_address
from expertd.server.local.gpu import Gpu, Release
from expertd.server.local.handover import Handover, receive
from expertd.server.local.mapping import check_segment, map_segment
from expertd.server.local.room import Room, Share
from expertd.server.options.config import InvalidOption
from expertd.server.rpc.identity import user
from expertd.server.rpc.tickets import Tickets

log = logging.getLogger(__name__)
CLOSE_SECONDS = 1.0
"""For memory to be given back at the end of the server, which a stuck device or a caller can keep from happening."""


class LocalDoor:
    """Takes segments from callers that have a ticket; the engine serves them until their connections are closed."""

    def __init__(
        self, name: str, max_bytes: int, tickets: Tickets, engine: Engine, gpu: Gpu, new_tasks: Callable[[], Tasks]
    ) -> None:
        """Takes at most `max_bytes` of segments and GPU memory. `name` is the socket's, as in the contract."""
        self._name = name
        self._room = Room(max_bytes)
        self._tickets = tickets
        self._engine = engine
        self.gpu = gpu
        self._tasks = new_tasks()
        self._connections = itertools.count(1)
        self._ends: dict[int, asyncio.Future[None]] = {}
        """By lane: done when nobody uses its memory any more."""
        self._kept: list[_Memory] = []
        """What is never unmapped."""

    @property
    def mapped_bytes(self) -> int:
        return self._room.taken_bytes

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
        asyncio.get_running_loop().add_reader(self._engine.lanes_fileno(), self._take_ended)
        self._accepting = self._tasks.keep(self._accept, "accepting local connections")

    def disconnect(self) -> None:
        self._engine.disconnect_lanes()

    async def drain(self, seconds: float) -> None:
        """Close all connections then."""
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        self._socket.close()
        self._forget_path()
        self._engine.drain_lanes()
        await self._tasks.settle(seconds)
        self.disconnect()

    async def close(self) -> None:
        await self._tasks.settle(CLOSE_SECONDS)
        asyncio.get_running_loop().remove_reader(self._engine.lanes_fileno())

    def _forget_path(self) -> None:
        """Names in the abstract namespace end with their socket; paths stay."""
        if not self._name.startswith("@"):
            Path(self._name).unlink(missing_ok=True)

    def _take_ended(self) -> None:
        for number in self._engine.take_ended_lanes():
            self._ends.pop(number).set_result(None)

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
        """The life of one lane."""
        try:
            check_peer(peer)
            memory = await self._take_memory(peer)
            try:
                over = self._begin(peer, memory)
            except BaseException:
                await self._give_back(memory)
                raise
        except ExpertdError as error:
            log.warning("a segment was refused: %s", error)
            _answer(peer, codec.encode_error(0, error))
            return
        await over
        await self._give_back(memory)

    async def _take_memory(self, peer: socket.socket) -> _Memory:
        """The memory that is handed over, mapped."""
        handover = await receive(peer)
        try:
            process, user_id = peer_of(peer)
            # A process of another PID namespace has no number here.
            who = f"process {process}" if process else f"connection {next(self._connections)}"
            guest = self._tickets.redeem(handover.ticket)
            caller, identity = guest.peer, guest.identity or user(user_id)
            if caller.startswith(UNIX):
                # Connections over a unix socket have no names to tell callers apart by.
                caller = f"{caller} {who}"
            if handover.gpu_bytes:
                self.gpu.require()
            segment_bytes = check_segment(handover.descriptors[0])
            share = self._room.take(who, segment_bytes + handover.gpu_bytes)
            owner = _Owner(caller, identity, share, guest.of_peer)
            try:
                return await self._map(handover, segment_bytes, owner)
            except BaseException:
                self._room.give_back(share)
                raise
        finally:
            await asyncio.to_thread(_close_all, handover.descriptors)

    async def _map(self, handover: Handover, segment_bytes: int, owner: _Owner) -> _Memory:
        segment = await asyncio.to_thread(map_segment, handover.descriptors[0], segment_bytes)
        if not handover.gpu_bytes:
            try:
                return _Memory(owner, segment, await self.gpu.pin(memoryview(segment)))
            except ExpertdError:
                await asyncio.to_thread(segment.close)
                raise
        # Not pinned: what the GPU would copy from the segment is in its own memory.
        on_gpu = await self.gpu.open(handover.descriptors[1], handover.gpu_bytes)
        return _Memory(owner, segment, Release((on_gpu.close,)), on_gpu)

    def _begin(self, peer: socket.socket, memory: _Memory) -> asyncio.Future[None]:
        """Have the lane served; done when nobody uses its memory any more. Raises `InvalidBatch`."""
        try:
            lane = self._engine.add_lane(
                memory.segment,
                peer.fileno(),
                memory.owner.caller,
                identity=memory.owner.identity,
                pinned=memory.pinned,
                gpu_address=memory.on_gpu.address if memory.on_gpu else 0,
                gpu_bytes=memory.on_gpu.size if memory.on_gpu else 0,
                of_peer=memory.owner.of_peer,
            )
        except ValueError as error:
            raise InvalidBatch(str(error)) from None
        # Nothing comes before it: until then callers post nothing.
        _answer(peer, b"")
        self._ends[lane] = over = asyncio.get_running_loop().create_future()
        return over

    async def _give_back(self, memory: _Memory) -> None:
        if not await self.gpu.release(memory.release):
            log.error("the segment of %s stays mapped: a device that hangs may use it", memory.owner.caller)
            self._kept.append(memory)
            return
        await asyncio.to_thread(memory.segment.close)
        self._room.give_back(memory.owner.share)


@dataclass(frozen=True, slots=True)
class _Owner:
    """Who has a lane, and what it has of the room for memory."""

    caller: str
    identity: str
    share: Share
    of_peer: bool
    """Whether memory of a GPU is another one's than the server's."""


@dataclass(frozen=True, slots=True)
class _Memory:
    """What one lane's caller shares."""

    owner: _Owner
    segment: Mapping
    release: Release | None
    on_gpu: GpuMemory | None = None
    """Kept, because it is mapped no longer than this exists."""

    @property
    def pinned(self) -> bool:
        return self.release is not None and self.on_gpu is None


def _close_all(descriptors: Iterable[int]) -> None:
    """Takes as long as gigabytes take to be freed, where nobody else has them."""
    for descriptor in descriptors:
        os.close(descriptor)


def _answer(peer: socket.socket, response: bytes) -> None:
    """Say what became of the handover."""
    with peer, contextlib.suppress(OSError):
        peer.send(framed(response))
