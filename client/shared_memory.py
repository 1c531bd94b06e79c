"""Calls to a server on this machine through shared memory, and over gRPC wherever that cannot be."""

from __future__ import annotations

import asyncio
import logging

from expertd.client.segment import Segment, Slot, layout_of
from expertd.client.transport import GrpcTransport, answer
from expertd.proto.codec import ExecuteCall, ExecuteResult, ShardInfo
from expertd.proto.errors import ExpertdError, NotPermitted, Unavailable
from expertd.proto.segment import Layout

log = logging.getLogger(__name__)
FIRST_BYTES = 16 << 20
"""Of the first segment; each further one doubles what there is, or is as large as a call needs."""
REGISTRATION_SECONDS = 5.0


class SharedMemoryTransport:
    """Segments shared with one server, as many as calls need at once, and a gRPC transport beside them."""

    def __init__(self, grpc: GrpcTransport, max_bytes: int) -> None:
        """Shares at most `max_bytes`; calls that find no room go over `grpc`."""
        self.address = grpc.address
        self._grpc = grpc
        self._max_bytes = max_bytes
        self._segments: list[Segment] = []
        self._growing = asyncio.Lock()
        self._may_grow = False

    @property
    def shares_memory(self) -> bool:
        return any(not segment.ended for segment in self._segments)

    async def get_shard(self, timeout: float) -> ShardInfo:
        shard = await self._grpc.get_shard(timeout)
        if not self.shares_memory:
            self._segments.clear()
            self._may_grow = True
            async with self._growing:
                await self._grow(min(FIRST_BYTES, self._max_bytes))
        return shard

    async def execute(self, call: ExecuteCall) -> ExecuteResult:
        slot = await self._take(layout_of(call))
        if slot is None:
            return await self._grpc.execute(call)
        slot.write(call)
        return await answer(self.address, call, slot.segment.exchange(call, slot), slot.partials)

    async def until_not_serving(self) -> Unavailable:
        return await self._grpc.until_not_serving()

    async def close(self) -> None:
        self._may_grow = False
        for segment in self._segments:
            segment.close()
        await self._grpc.close()

    async def _take(self, layout: Layout) -> Slot | None:
        """Room for a call, in more memory if need be; None when there is none to be had."""
        slot = self._find(layout)
        if slot is None and self._may_grow:
            async with self._growing:
                slot = self._find(layout)
                if slot is None and await self._grow(layout.end):
                    slot = self._find(layout)
        return slot

    def _find(self, layout: Layout) -> Slot | None:
        for segment in self._segments:
            slot = None if segment.ended else segment.take(layout)
            if slot is not None:
                return slot
        return None

    async def _grow(self, needed: int) -> bool:
        """Share at least `needed` more bytes if the bound and the server let us."""
        shared = sum(segment.size for segment in self._segments)
        size = min(max(needed, shared), self._max_bytes - shared)
        if not self._may_grow or size < needed:
            return False
        try:
            async with asyncio.timeout(REGISTRATION_SECONDS):
                registration = await self._grpc.register_shared_memory(REGISTRATION_SECONDS)
                self._segments.append(await Segment.open(self.address, registration, size))
        except (ExpertdError, OSError) as error:
            # Not asked again before the server is found anew.
            self._may_grow = False
            level = logging.INFO if isinstance(error, NotPermitted) else logging.WARNING
            log.log(level, "%s: no memory is shared, calls go over gRPC: %s", self.address, str(error) or "no answer")
            return False
        log.info("%s: sharing %d more bytes of memory", self.address, size)
        return True
