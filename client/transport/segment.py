"""Memory shared with one server, and the socket on which calls in it are announced."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
import weakref
from collections import deque
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from expertd.client.base.blocks import copy_bytes
from expertd.client.transport.gpu_room import GpuRoom
from expertd.kernels.memory.gpu import GpuMemory
from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, Unavailable
from expertd.proto.codec import ExecuteCall, RawResponse, Registration
from expertd.proto.lane.frames import AnswerFrames, check_peer, socket_address
from expertd.proto.lane.free_list import FreeList
from expertd.proto.lane.layout import GPU_SIZE_BYTES, Layout, aligned, lay_out


class Slot:
    """A part of a segment that one call has. It is free again when the last view of its memory is gone."""

    def __init__(self, segment: Segment, offset: int, layout: Layout, gpu: tuple[int, Tensor] | None) -> None:
        """`gpu` is where the call's part of GPU memory is, and that part, if it has one."""
        self.segment = segment
        self.offset = offset
        self._gpu = gpu
        self._layout = layout
        bytes_ = np.frombuffer(segment.memory, np.uint8, layout.end, offset)
        weakref.finalize(bytes_, segment.given_back.append, (offset, layout.end)).atexit = False
        self._host = torch.from_numpy(bytes_)

    @property
    def partials(self) -> Tensor:
        """[n] uint8: where the server puts them."""
        return self._values[self._layout.partials]

    @property
    def gpu_offset(self) -> int | None:
        return None if self._gpu is None else self._gpu[0]

    @property
    def _values(self) -> Tensor:
        return self._host if self._gpu is None else self._gpu[1]

    async def write(self, call: ExecuteCall, stream: torch.cuda.Stream | None) -> None:
        """Copy the tensors of `call` here, and wait until `stream`, that of its GPU, has come so far."""
        layout = self._layout
        places = (
            (self._values[layout.hidden], call.hidden),
            (self._values[layout.hidden_scales], call.scales),
            (self._host[layout.expert_ids], call.expert_ids),
            (self._host[layout.weights], call.weights),
        )
        if stream is None:
            for place, tensor in places:
                if tensor is not None:
                    await copy_bytes(place, codec.flat_bytes(tensor))
            return
        with torch.cuda.stream(stream):
            for place, tensor in places:
                if tensor is not None:
                    place.copy_(codec.flat_bytes(tensor), non_blocking=True)
        written = stream.record_event()
        while not written.query():
            await asyncio.sleep(0)


class Segment:
    """A memfd mapped by this process and by a server, perhaps GPU memory beside it, and one connection for both."""

    def __init__(self, address: str, memory: mmap.mmap, gpu: GpuRoom | None = None) -> None:
        """`address` is the server's, for people to read."""
        self._address = address
        self.memory = memory
        self._gpu = gpu
        self.given_back: deque[tuple[int, int]] = deque()
        """Slots that are no longer used; views may be dropped on any thread."""
        self._free = FreeList(len(memory))
        self._waiting: dict[int, tuple[asyncio.Future[RawResponse], Slot]] = {}
        self._frames = AnswerFrames(self._on_frame, self._on_end)
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = False

    @classmethod
    async def open(
        cls, address: str, registration: Registration, size: int, gpu: tuple[GpuMemory, int] | None = None
    ) -> Self:
        """Share `size` new bytes, and `gpu` memory with its descriptor, with the server that gave `registration`.

        Raises OSError or an `ExpertdError`.
        """
        descriptor = os.memfd_create("expertd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            # Populating takes 0.1 s for a few hundred MB.
            memory = await asyncio.to_thread(mmap.mmap, descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            if gpu is None:
                segment = cls(address, memory)
                await segment._connect(registration.socket, registration.ticket, [descriptor])
            else:
                gpu_memory, gpu_descriptor = gpu
                segment = cls(address, memory, GpuRoom(gpu_memory))
                ticket = registration.ticket + gpu_memory.size.to_bytes(GPU_SIZE_BYTES, "little")
                await segment._connect(registration.socket, ticket, [descriptor, gpu_descriptor])
        finally:
            os.close(descriptor)
        return segment

    @property
    def size(self) -> int:
        """Bytes for hidden states and partials."""
        return len(self.memory) if self._gpu is None else self._gpu.size

    def take(self, layout: Layout, stream: torch.cuda.Stream | None) -> Slot | None:
        """Room for a call of `stream`, or None."""
        while self.given_back:
            start, length = self.given_back.popleft()
            self._free.give_back(start, aligned(length))
        gpu = None if self._gpu is None or stream is None else self._gpu.take(layout.gpu_end, stream)
        if layout.on_gpu and gpu is None:
            return None
        offset = self._free.take(aligned(layout.end))
        return None if offset is None else Slot(self, offset, layout, gpu)

    async def exchange(self, call: ExecuteCall, slot: Slot) -> RawResponse:
        """Announce `call`, whose tensors are in `slot`, and wait until its partials are there."""
        if self.ended:
            raise self._closed(None)
        future: asyncio.Future[RawResponse] = asyncio.get_running_loop().create_future()
        # Kept until the response has come even if nobody waits for it any more: so long the slot is the server's.
        self._waiting[call.request_id] = future, slot
        self._frames.send(codec.encode_call(call, slot.offset, slot.gpu_offset))
        try:
            return await future
        except asyncio.CancelledError:
            self._frames.send(codec.encode_cancellation(call.request_id))
            raise

    def close(self) -> None:
        """End the connection; calls in flight fail with `Unavailable`."""
        self._frames.close()

    async def _connect(self, name: str, ticket: bytes, descriptors: list[int]) -> None:
        loop = asyncio.get_running_loop()
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, socket_address(name))
            check_peer(connection)
            socket.send_fds(connection, [ticket], descriptors)
            await loop.create_unix_connection(lambda: self._frames, sock=connection)
        except BaseException:
            connection.close()
            raise
        try:
            await self._accepted
        except BaseException:
            self.close()
            raise

    def _on_frame(self, message: bytes) -> None:
        try:
            response = codec.parse_response(message)
            if response.error is not None and not response.request_id:
                # Not of one call: of the handover, or of what cannot be read.
                raise codec.read_error(response.error)
        except ExpertdError as error:
            self._fail(error.again(f"{self._address}: "))
            self.close()
            return
        if not self._accepted.done():
            self._accepted.set_result(None)
            return
        future, _ = self._waiting.pop(response.request_id, (None, None))
        if future is not None and not future.done():
            future.set_result(response)

    def _on_end(self, error: Exception | None) -> None:
        self.ended = True
        self._fail(self._closed(error))

    def _closed(self, error: Exception | None) -> Unavailable:
        return Unavailable(
            f"{self._address}: the connection of shared memory was closed{f': {error}' if error else ''}"
        )

    def _fail(self, error: ExpertdError) -> None:
        """Tell all who wait."""
        futures: list[asyncio.Future[Any]] = [self._accepted, *(future for future, _ in self._waiting.values())]
        for future in futures:
            if not future.done():
                future.set_exception(error.again())
        self._waiting.clear()


def layout_of(call: ExecuteCall, *, on_gpu: bool) -> Layout:
    """Where the tensors of `call` are in its slot."""
    tokens, width = call.hidden.shape
    top_k = call.expert_ids.shape[1]
    return lay_out(0, 0 if on_gpu else None, tokens, width, top_k, call.hidden.dtype, call.reply_dtype)
