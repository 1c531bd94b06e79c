"""Segments shared with one server for tensors of one device, as many as calls need at once."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from functools import partial

import torch

from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.segment import Segment, Slot, call_bytes, segment_bytes
from expertd.kernels.memory.gpu import GpuMemory, GpuMemoryError, gpu_uuid
from expertd.proto.base.errors import ExpertdError, NotPermitted, Overloaded
from expertd.proto.codec import Registration
from expertd.proto.lane.layout import ALIGNMENT, LANE_VERSION, Layout, reply_room

log = logging.getLogger(__name__)
REGISTRATION_SECONDS = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
"""Seconds after which a server is asked again that had no room, doubled each time."""
SEGMENT_SHARE = 8
"""Beside GPU memory a segment has one byte for so many there: ids, weights and the calls' slots."""


class SegmentPool:
    """Grows as calls need it, within a bound and as far as the server allows."""

    def __init__(
        self,
        grpc: GrpcTransport,
        device: torch.device,
        max_bytes: int,
        first_bytes: int,
        spin_us: int | None,
        clock: Callable[[], float],
    ) -> None:
        """Segments are registered over `grpc`; those of a GPU have at most `max_bytes` of its memory.

        The first one has `first_bytes`; each further one doubles what there is, or is as large as a call needs.
        """
        self._grpc = grpc
        self._device = device
        self._max_bytes = max_bytes
        self._first_bytes = first_bytes
        self._spin_us = spin_us
        self._clock = clock
        self._reply_room = 0
        self.segments: tuple[Segment, ...] = ()
        """Those that have ended among them; another object whenever it changes."""
        self._growing = asyncio.Lock()
        self._may_grow = False
        self._pause = FIRST_PAUSE
        self._not_before = 0.0

    @property
    def shared(self) -> bool:
        """Whether there is any."""
        return any(not segment.ended for segment in self.segments)

    def renew(self, experts: int) -> None:
        """The server was found, perhaps anew, and has so many experts: what it refused before may be asked again."""
        if not self.shared:
            self.segments = ()
            self._may_grow = True
            self._pause, self._not_before = FIRST_PAUSE, 0.0
            self._reply_room = reply_room(experts)

    async def begin(self) -> None:
        """Have a first segment, before calls need it."""
        if not self.shared:
            async with self._growing:
                await self._grow(segment_bytes(ALIGNMENT))

    async def take(self, layout: Layout, stream: torch.cuda.Stream | None) -> Slot | None:
        """Room for a call, in more memory if need be; None when there is none to be had."""
        slot = self.find(layout, stream)
        if slot is None and self._may_grow:
            host_bytes = segment_bytes(call_bytes(layout, self._reply_room))
            needed = (layout.gpu_end, host_bytes) if layout.on_gpu else (host_bytes,)
            async with self._growing:
                slot = self.find(layout, stream)
                if slot is None and await self._grow(*needed):
                    slot = self.find(layout, stream)
        return slot

    def close(self) -> None:
        """End the connections; calls in flight fail with `Unavailable`."""
        self._may_grow = False
        for segment in self.segments:
            segment.close()
        self.segments = ()

    def find(self, layout: Layout, stream: torch.cuda.Stream | None = None) -> Slot | None:
        """Room for a call in what is shared by now. Any thread."""
        for segment in self.segments:
            slot = None if segment.ended else segment.take(layout, stream)
            if slot is not None:
                return slot
        return None

    async def _grow(self, needed: int, beside: int = 0) -> bool:
        """Share at least `needed` more bytes, and `beside` GPU memory so many, if the bound and the server let us."""
        shared = sum(segment.size for segment in self.segments)
        # Somewhat more: in several requests a call takes a slot for each.
        size = min(max(needed + needed // 64, shared or self._first_bytes), self._max_bytes - shared)
        if not self._may_grow or size < needed or self._clock() < self._not_before:
            return False
        try:
            async with asyncio.timeout(REGISTRATION_SECONDS):
                registration = await self._grpc.register_shared_memory(REGISTRATION_SECONDS, gpu_uuid(self._device))
                segment = await self._open(registration, size, beside)
                self.segments = (*self.segments, segment)
        except Overloaded as error:
            # Others may give back what they have.
            self._not_before = self._clock() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._tell(error)
            return False
        except (ExpertdError, GpuMemoryError, OSError) as error:
            # Not asked again before the server is found anew.
            self._may_grow = False
            self._tell(error)
            return False
        self._pause = FIRST_PAUSE
        log.info("%s: sharing %d more bytes of memory (%s)", self._grpc.address, size, self._device)
        return True

    async def _open(self, registration: Registration, size: int, beside: int) -> Segment:
        check_version(registration)
        share = partial(
            Segment.open, self._grpc.address, registration, reply_room=self._reply_room, spin_us=self._spin_us
        )
        if self._device.type == "cpu":
            return await share(size)
        if not registration.gpu:
            raise NotPermitted(f"the server computes on no GPU; the tensors are on {gpu_uuid(self._device)}")
        memory, descriptor = GpuMemory.create(size, self._device)
        try:
            return await share(max(beside, size // SEGMENT_SHARE), gpu=(memory, descriptor))
        finally:
            os.close(descriptor)

    def _tell(self, error: Exception) -> None:
        level = logging.INFO if isinstance(error, NotPermitted) else logging.WARNING
        what = "no memory is shared, calls go over gRPC"
        if self._device.type != "cpu":
            what = f"no memory of {self._device} is shared, its tensors go through host memory"
        log.log(level, "%s: %s: %s", self._grpc.address, what, str(error) or "no answer")


def check_version(registration: Registration) -> None:
    """Raise `NotPermitted` for a server whose lanes are not this caller's."""
    if registration.lane_version != LANE_VERSION:
        version = registration.lane_version
        raise NotPermitted(f"the server's lanes are of version {version}; this caller's are of {LANE_VERSION}")
