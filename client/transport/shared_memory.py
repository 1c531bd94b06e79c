"""Calls to a server on this machine through shared memory, and over gRPC wherever that cannot be."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial

import torch

from expertd import _native
from expertd.client.transport.answer import answer, finished
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.native_call import LONG_ELEMENTS, OneOwner, Watch
from expertd.client.transport.segment import Segment, Slot, layout_of
from expertd.client.transport.segment_pool import SegmentPool
from expertd.kernels.memory.gpu import stream_of
from expertd.proto.base.errors import Unavailable
from expertd.proto.codec import ExecuteCall, ExecuteResult, ShardInfo

CHUNK_BYTES = 32 << 20
"""Of one request's sums: while a server has some, others are written, or their sums are added."""
FIRST_BYTES = 16 << 20
"""See `SegmentPool`."""
HOST = torch.device("cpu")


class SharedMemoryTransport:
    """Segments shared with one server, for every device that calls come from, and a gRPC transport beside them."""

    def __init__(
        self,
        grpc: GrpcTransport,
        max_bytes: int,
        chunk_bytes: int = CHUNK_BYTES,
        spin_us: int | None = None,
        *,
        first_bytes: int = FIRST_BYTES,
        clock: Callable[[], float] = time.monotonic,
        checked: bool = False,
    ) -> None:
        """Shares at most `max_bytes` of each device's memory; calls that find no room go over `grpc`.

        `checked`: whether requests, and with them answers, have checksums of what is in that memory.
        """
        self.address = grpc.address
        self.grpc = grpc
        """What goes another way."""
        self._chunk_bytes = chunk_bytes
        self._checked = checked
        self._experts = 0
        self._server = OneOwner()
        self._new_pool = partial(
            SegmentPool, grpc, max_bytes=max_bytes, first_bytes=first_bytes, spin_us=spin_us, clock=clock
        )
        self._pools = {HOST: self._new_pool(HOST)}

    @property
    def chunk_bytes(self) -> int:
        return self._chunk_bytes if self._pools[HOST].shared else self.grpc.chunk_bytes

    @property
    def checked(self) -> bool:
        return self._checked if self.segments else self.grpc.checked

    @property
    def shared_devices(self) -> frozenset[torch.device]:
        return frozenset(device for device, pool in self._pools.items() if pool.shared)

    @property
    def heard(self) -> float:
        return self.grpc.heard

    @heard.setter
    def heard(self, when: float) -> None:
        self.grpc.heard = when

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self._pools[HOST].segments

    async def get_shard(self, timeout: float) -> ShardInfo:
        shard = await self.grpc.get_shard(timeout)
        self._experts = shard.routed_experts
        for pool in self._pools.values():
            pool.renew(self._experts)
        await self._pools[HOST].begin()
        return shard

    async def execute(self, call: ExecuteCall) -> ExecuteResult:
        stream = stream_of(call.hidden)
        # Long ones are written by other threads, and go in one request.
        short = stream is None and call.hidden.numel() <= LONG_ELEMENTS
        begun = self._begin(call, looped=True) if short else None
        result = None if begun is None else await self._collect(call, begun)
        return await self._execute_in_slot(call, stream) if result is None else result

    async def _execute_in_slot(self, call: ExecuteCall, stream: torch.cuda.Stream | None) -> ExecuteResult:
        """In more memory if need be, on the GPU where the tensors are, which are written on `stream`."""
        slot = await self._take(call, stream)
        if slot is None:
            return await self.grpc.execute(call)
        # The caller's GPU may be busy for long: that time is not the server's.
        await slot.write(call, stream)
        exchange = slot.segment.post(call, slot, checked=self._checked)
        if exchange is None:
            return await self.grpc.execute(call)
        result = await answer(self.address, call, exchange, slot.partials, checked=self._checked)
        self.heard = time.monotonic()
        return result

    def exchange(self, request_id: int, message: bytes) -> Awaitable[bytes]:
        return self.grpc.exchange(request_id, message)

    def call(self, call: ExecuteCall) -> ExecuteResult | None:
        """Compute one call whose tensors are in host memory, on this thread, which spins or sleeps meanwhile.

        For any thread, while the event loop runs on another or this one. None when there is no room in the memory that
        is shared by now: `execute` shares more. Raises like `execute`. Partials of FP8 replies come in FP32.
        """
        begun = self._begin(call, looped=False)
        return None if begun is None else self._finish(call, begun, call.timeout)

    def _begin(self, call: ExecuteCall, *, looped: bool) -> _native.StraightCall | None:
        """Send a call whose tensors are in host memory, in the memory that is shared by now."""
        segments = self.segments
        if not segments:
            return None
        return self._server.begin(call, segments, checked=self._checked, chunk_bytes=self._chunk_bytes, looped=looped)

    async def _collect(self, call: ExecuteCall, begun: _native.StraightCall) -> ExecuteResult | None:
        """What `_finish` says, once the event loop of the lanes has waited for it."""
        segments = self.segments
        try:
            with Watch(begun, segments) as watch:
                await watch.wait(call.timeout)
            return self._finish(call, begun, 0.0)
        except Unavailable:
            for segment in segments:
                if segment.ended:
                    raise segment.end_error() from None
            raise
        finally:
            begun.drop()

    def _finish(self, call: ExecuteCall, begun: _native.StraightCall, timeout: float | None) -> ExecuteResult | None:
        """The result of what was begun, waited for at most so many seconds. Raises its error; None without room."""
        result = finished(self.address, call, begun, timeout, checked=self._checked)
        if result is not None:
            self.heard = time.monotonic()
        return result

    async def until_not_serving(self) -> Unavailable:
        return await self.grpc.until_not_serving()

    async def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        await self.grpc.close()

    async def _take(self, call: ExecuteCall, stream: torch.cuda.Stream | None) -> Slot | None:
        """Room for a call, on its tensors' GPU if it can be had there."""
        if stream is not None:
            if stream.device not in self._pools:
                self._pools[stream.device] = self._new_pool(stream.device)
                self._pools[stream.device].renew(self._experts)
            slot = await self._pools[stream.device].take(layout_of(call, on_gpu=True), stream)
            if slot is not None:
                return slot
        return await self._pools[HOST].take(layout_of(call, on_gpu=False), None)
