"""Segments shared with one server for tensors of one device, as many as calls need at once."""

from __future__ import annotations

import asyncio
import logging
import os

import torch

from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.segment import Segment, Slot
from expertd.kernels.memory.gpu import GpuMemory, GpuMemoryError, gpu_uuid
from expertd.proto.base.errors import ExpertdError, NotPermitted
from expertd.proto.codec import Registration
from expertd.proto.lane.layout import Layout

log = logging.getLogger(__name__)
FIRST_BYTES = 16 << 20
"""Of the first segment; each further one doubles what there is, or is as large as a call needs."""
REGISTRATION_SECONDS = 5.0
SEGMENT_SHARE = 16
"""Beside GPU memory a segment has one byte for so many there: ids and weights alone, of which there are few."""


class SegmentPool:
    """Grows as calls need it, within a bound and as far as the server allows."""

    def __init__(self, grpc: GrpcTransport, device: torch.device, max_bytes: int) -> None:
        """Segments are registered over `grpc`; those of a GPU have at most `max_bytes` of its memory."""
        self._grpc = grpc
        self._device = device
        self._max_bytes = max_bytes
        self.segments: list[Segment] = []
        self._growing = asyncio.Lock()
        self._may_grow = False

    @property
    def shared(self) -> bool:
        """Whether there is any."""
        return any(not segment.ended for segment in self.segments)

    def renew(self) -> None:
        """The server was found, perhaps anew: what it refused before may be asked again."""
        if not self.shared:
            self.segments.clear()
            self._may_grow = True

    async def begin(self) -> None:
        """Have a first segment, before calls need it."""
        if not self.shared:
            async with self._growing:
                await self._grow(0)

    async def take(self, layout: Layout, stream: torch.cuda.Stream | None) -> Slot | None:
        """Room for a call, in more memory if need be; None when there is none to be had."""
        slot = self._find(layout, stream)
        if slot is None and self._may_grow:
            needed = (layout.gpu_end, layout.end) if layout.on_gpu else (layout.end,)
            async with self._growing:
                slot = self._find(layout, stream)
                if slot is None and await self._grow(*needed):
                    slot = self._find(layout, stream)
        return slot

    def close(self) -> None:
        """End the connections; calls in flight fail with `Unavailable`."""
        self._may_grow = False
        for segment in self.segments:
            segment.close()
        self.segments.clear()

    def _find(self, layout: Layout, stream: torch.cuda.Stream | None) -> Slot | None:
        for segment in self.segments:
            slot = None if segment.ended else segment.take(layout, stream)
            if slot is not None:
                return slot
        return None

    async def _grow(self, needed: int, beside: int = 0) -> bool:
        """Share at least `needed` more bytes, and `beside` GPU memory so many, if the bound and the server let us."""
        shared = sum(segment.size for segment in self.segments)
        size = min(max(needed, shared or FIRST_BYTES), self._max_bytes - shared)
        if not self._may_grow or size < needed:
            return False
        try:
            async with asyncio.timeout(REGISTRATION_SECONDS):
                registration = await self._grpc.register_shared_memory(REGISTRATION_SECONDS)
                self.segments.append(await self._open(registration, size, beside))
        except (ExpertdError, GpuMemoryError, OSError) as error:
            # Not asked again before the server is found anew.
            self._may_grow = False
            self._tell(error)
            return False
        log.info("%s: sharing %d more bytes of memory (%s)", self._grpc.address, size, self._device)
        return True

    async def _open(self, registration: Registration, size: int, beside: int) -> Segment:
        if self._device.type == "cpu":
            return await Segment.open(self._grpc.address, registration, size)
        here = gpu_uuid(self._device)
        if registration.gpu != here:
            raise NotPermitted(f"the server computes on {registration.gpu or 'no GPU'}; the tensors are on {here}")
        memory, descriptor = GpuMemory.create(size, self._device)
        try:
            size = max(beside, size // SEGMENT_SHARE)
            return await Segment.open(self._grpc.address, registration, size, (memory, descriptor))
        finally:
            os.close(descriptor)

    def _tell(self, error: Exception) -> None:
        level = logging.INFO if isinstance(error, NotPermitted) else logging.WARNING
        what = "no memory is shared, calls go over gRPC"
        if self._device.type != "cpu":
            what = f"no memory of {self._device} is shared, its tensors go through host memory"
        log.log(level, "%s: %s: %s", self._grpc.address, what, str(error) or "no answer")
