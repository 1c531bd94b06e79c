"""Memory shared with one server, and the lane in it on which calls are announced."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from socket import socket
from typing import Self

import numpy as np
import torch
from torch import Tensor

from expertd import _native
from expertd.client.base.blocks import copy_bytes
from expertd.client.transport.gpu_room import GpuRoom
from expertd.client.transport.handover import closed, error_in, hand_over
from expertd.kernels.memory.gpu import GpuMemory
from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, ServerFault
from expertd.proto.codec import ExecuteCall, RawResponse, Registration
from expertd.proto.lane.layout import ALIGNMENT, GPU_SIZE_BYTES, Layout, aligned, lay_out

REQUEST_BYTES = 512
"""For an ExecuteRequest without tensors; longer ones go over gRPC."""
MIN_ENTRIES, MAX_ENTRIES, BYTES_AN_ENTRY = 64, 4096, 4096
"""Of a lane's ring: with so few bytes a call, the segment is full first."""


class Slot:
    """A part of a segment that one call has. It is free again when the last view of its memory is gone."""

    def __init__(self, segment: Segment, offset: int, layout: Layout, gpu: tuple[int, Tensor] | None) -> None:
        """`gpu` is where the call's part of GPU memory is, and that part, if it has one."""
        self.segment = segment
        self.offset = offset
        self.number = offset + aligned(layout.end)
        """Where the lane's slot is: behind the tensors."""
        self._gpu = gpu
        self._layout = layout
        bytes_ = np.frombuffer(segment.memory, np.uint8, layout.end, offset)
        # Views may be dropped on any thread.
        weakref.finalize(bytes_, segment.lane.give_back, offset, segment.bytes_for(layout)).atexit = False
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
        if stream is None:
            for place, values in self._places(call):
                await copy_bytes(place, values)
            return
        with torch.cuda.stream(stream):
            for place, values in self._places(call):
                place.copy_(values, non_blocking=True)
        written = stream.record_event()
        while not written.query():
            await asyncio.sleep(0)

    def checksum(self) -> int:
        """Of the tensors that are written here, without those on a GPU."""
        layout = self._layout
        on_host = (layout.expert_ids, layout.weights)
        places = on_host if layout.on_gpu else (layout.hidden, layout.hidden_scales, *on_host)
        return codec.bytes_checksum(self._host[place].numpy().data for place in places)

    def _places(self, call: ExecuteCall) -> Iterator[tuple[Tensor, Tensor]]:
        """Where each tensor belongs, and its bytes."""
        layout = self._layout
        for place, tensor in (
            (self._values[layout.hidden], call.hidden),
            (self._values[layout.hidden_scales], call.scales),
            (self._host[layout.expert_ids], call.expert_ids),
            (self._host[layout.weights], call.weights),
        ):
            if tensor is not None:
                yield place, codec.flat_bytes(tensor)


class Segment:
    """A lane: memory that a server maps, too, perhaps GPU memory beside it, and one connection for both."""

    def __init__(
        self, address: str, lane: _native.ClientLane, connection: socket, reply_room: int, gpu: GpuRoom | None = None
    ) -> None:
        """`address` is the server's, for people to read; on `connection`, from now on the lane's, it was accepted."""
        self._address = address
        self.lane = lane
        self.memory = memoryview(lane.memory)
        self.reply_room = reply_room
        """Of each call, in bytes."""
        self._gpu = gpu
        self._waiting: dict[int, tuple[asyncio.Future[RawResponse], Slot]] = {}
        """By the slot's number; kept until the reply has come even if nobody waits: so long it is the server's."""
        self._watched: dict[int, Callable[[], None]] = {}
        lane.connect(connection.detach())
        asyncio.get_running_loop().add_reader(lane.socket, self._on_bell)
        self._on_bell()

    @classmethod
    async def open(
        cls,
        address: str,
        registration: Registration,
        size: int,
        reply_room: int,
        spin_us: int | None = None,
        gpu: tuple[GpuMemory, int] | None = None,
        *,
        posted_by_gpu: bool = False,
    ) -> Self:
        """Share `size` new bytes, and `gpu` memory with its descriptor, with the server that gave `registration`.

        Raises OSError or an `ExpertdError`.
        """
        lane = await asyncio.to_thread(_native.ClientLane, size, entries_of(size), spin_us, posted_by_gpu)
        if gpu is None:
            connection = await hand_over(address, registration.socket, registration.ticket, [lane.descriptor])
            return cls(address, lane, connection, reply_room)
        memory, descriptor = gpu
        ticket = registration.ticket + memory.size.to_bytes(GPU_SIZE_BYTES, "little")
        connection = await hand_over(address, registration.socket, ticket, [lane.descriptor, descriptor])
        return cls(address, lane, connection, reply_room, GpuRoom(memory))

    @property
    def size(self) -> int:
        """Bytes of the memory that hidden states and partials are in."""
        return len(self.memory) if self._gpu is None else self._gpu.size

    @property
    def ended(self) -> bool:
        return self.lane.ended

    def bytes_for(self, layout: Layout) -> int:
        """What a call takes."""
        return call_bytes(layout, self.reply_room)

    def take(self, layout: Layout, stream: torch.cuda.Stream | None) -> Slot | None:
        """Room for a call of `stream`, or None."""
        gpu = None if self._gpu is None or stream is None else self._gpu.take(layout.gpu_end, stream)
        if layout.on_gpu and gpu is None:
            return None
        offset = self.lane.take(self.bytes_for(layout))
        return None if offset is None else Slot(self, offset, layout, gpu)

    def post(self, call: ExecuteCall, slot: Slot, *, checked: bool = False) -> asyncio.Future[RawResponse] | None:
        """Announce `call`, whose tensors are in `slot`: its response, when its partials are there; None without room.

        Cancelling it tells the server so. Raises `Unavailable`.
        """
        written = slot.checksum() if checked else None
        message = codec.encode_call(call, slot.offset, slot.gpu_offset, checked=checked, written=written)
        if len(message) > REQUEST_BYTES:
            return None
        try:
            if not self.lane.post(slot.number, message, self.reply_room, looped=True):
                return None
        except ConnectionError:
            raise self.end_error() from None
        future: asyncio.Future[RawResponse] = asyncio.get_running_loop().create_future()
        self._waiting[slot.number] = future, slot
        future.add_done_callback(partial(self._on_done, slot.number))
        return future

    def watch(self, number: int, look: Callable[[], None]) -> None:
        """Have `look` called by the event loop when a looped call that others posted is done, or the lane has ended."""
        self._watched[number] = look

    def unwatch(self, number: int, look: Callable[[], None]) -> None:
        """Call `look` no more; the slot may be another call's by now, with a `look` of its own."""
        if self._watched.get(number) == look:
            del self._watched[number]

    def close(self) -> None:
        """End the lane; calls in flight fail with `Unavailable`."""
        if not self.ended:
            self.lane.close()
            self._end()

    def release_gpu(self) -> None:
        """Keep the GPU memory no longer: no call is to use it any more."""
        self._gpu = None

    def _on_done(self, number: int, future: asyncio.Future[RawResponse]) -> None:
        # The slot may have been answered meanwhile, and be another call's.
        if future.cancelled() and self._waiting.get(number, (None,))[0] is future:
            self.lane.cancel(number)

    def _on_bell(self) -> None:
        for number in self.lane.poll():
            if number in self._waiting:
                self._take_reply(number)
            elif look := self._watched.pop(number, None):
                look()
        for number in self.lane.reap():
            del self._waiting[number]
        if self.ended:
            self._end()

    def _take_reply(self, number: int) -> None:
        reply = self.lane.reply(number)
        future, _ = self._waiting.pop(number)
        if future.done():
            return
        try:
            if reply is None:
                raise ServerFault("the reply is longer than its room")
            future.set_result(codec.parse_response(reply))
        except ServerFault as error:
            future.set_exception(error.again(f"{self._address}: "))

    def _end(self) -> None:
        """The lane has ended: tell all who wait."""
        asyncio.get_running_loop().remove_reader(self.lane.socket)
        error = self.end_error()
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(error.again())
        self._waiting.clear()
        for look in list(self._watched.values()):
            look()

    def end_error(self) -> ExpertdError:
        """Why the lane has ended."""
        try:
            return error_in(self._address, self.lane.reason) or closed(self._address)
        except ServerFault as error:
            return error.again(f"{self._address}: ")


def entries_of(size: int) -> int:
    """Of the ring of a lane of `size` bytes."""
    fitting = max(MIN_ENTRIES, min(MAX_ENTRIES, size // BYTES_AN_ENTRY))
    return 1 << (fitting.bit_length() - 1)


def call_bytes(layout: Layout, reply_room: int) -> int:
    """What a call takes of a segment: its tensors, its slot and the reply."""
    return aligned(layout.end) + ALIGNMENT + REQUEST_BYTES + reply_room


def segment_bytes(needed: int) -> int:
    """Of a segment that has `needed` bytes for calls."""
    # More than enough: of twice as many bytes, the ring is as large or larger.
    return needed + _native.ClientLane.data_at(entries_of(2 * needed))


def layout_of(call: ExecuteCall, *, on_gpu: bool) -> Layout:
    """Where the tensors of `call` are in its slot."""
    tokens, width = call.hidden.shape
    top_k = call.expert_ids.shape[1]
    return lay_out(0, 0 if on_gpu else None, tokens, width, top_k, call.hidden.dtype, call.reply_dtype)
