"""Memory that one server shares for stream-ordered calls: one call's tensors, and a slot for each layer and class."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from expertd.client.base.devices import on_device
from expertd.client.fleet.member import Member
from expertd.client.stream import kernels
from expertd.client.stream.terms import Terms, slot_bytes
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.segment import Segment, segment_bytes
from expertd.client.transport.segment_pool import REGISTRATION_SECONDS, check_version
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.kernels.memory.gpu import GpuMemory, GpuMemoryError, gpu_uuid, wait_for
from expertd.proto import codec
from expertd.proto.base.errors import (
    ExpertdError,
    NotPermitted,
    ServerFault,
    Unavailable,
    UnknownExpert,
    error_from_status,
)
from expertd.proto.lane.layout import ALIGNMENT, GPU_ALIGNMENT, aligned, reply_room

log = logging.getLogger(__name__)
ENTRIES_AT = 12
"""Where the segment tells how many entries its ring has."""
SLOT_REQUEST, SLOT_REPLY = 4, 12
"""Of a slot, where the lengths of request and reply are."""
GONE, TOO_LATE = 1, 2
"""What the word OVER says."""


class Failure(NamedTuple):
    """What became of a call."""

    error: ExpertdError
    is_of_server: bool
    """Not of the caller, who named experts that nobody has."""


class StreamLane:
    """One server's. Its calls follow each other, as the stream has them."""

    def __init__(self, member: Member, segment: Segment, terms: Terms, gpu: GpuMemory | None) -> None:
        """`gpu` has hidden states, scales and partial sums, if the server reaches it; else the segment has."""
        self.member = member
        self.address = member.transport.address
        self._segment = segment
        self._terms = terms
        self._gpu = gpu
        self.on_gpu = gpu is not None
        self._base = torch.frombuffer(segment.memory, dtype=torch.uint8).data_ptr()
        self._words = np.frombuffer(segment.memory, np.uint32)
        self._slots, self._tensors = _parts(segment.lane.data, terms)
        self._write_slots()
        self._pinned = terms.device.type == "cuda" and self._pin()
        self._waits_since: tuple[int, float] = (0, 0.0)
        """The entries posted at a look, and when that was first seen."""

    @classmethod
    async def open(cls, member: Member, terms: Terms) -> Self:
        """Share memory with a server. Raises an `ExpertdError`."""
        transport = member.transport
        if not isinstance(transport, SharedMemoryTransport):
            raise NotPermitted(
                f"{transport.address} shares no memory: stream-ordered calls need servers of this machine"
            )
        if terms.device.type == "cuda":
            try:
                return await cls._open(member, transport.grpc, terms, on_gpu=True)
            except Unavailable:
                raise
            except (ExpertdError, GpuMemoryError) as error:
                log.warning(
                    "%s: no memory of %s is shared, hidden states and sums of stream-ordered calls go through host"
                    " memory: %s",
                    transport.address,
                    terms.device,
                    error,
                )
        return await cls._open(member, transport.grpc, terms, on_gpu=False)

    @classmethod
    async def _open(cls, member: Member, transport: GrpcTransport, terms: Terms, *, on_gpu: bool) -> Self:
        try:
            async with asyncio.timeout(REGISTRATION_SECONDS):
                return await cls._share(member, transport, terms, on_gpu=on_gpu)
        except TimeoutError:
            raise Unavailable(f"{transport.address} has not taken memory within {REGISTRATION_SECONDS:g} s") from None
        except OSError as error:
            raise Unavailable(f"{transport.address}: memory cannot be shared: {error.strerror}") from None

    @classmethod
    async def _share(cls, member: Member, transport: GrpcTransport, terms: Terms, *, on_gpu: bool) -> Self:
        registration = await transport.register_shared_memory(REGISTRATION_SECONDS, gpu_uuid(terms.device))
        check_version(registration)
        if on_gpu and not registration.gpu:
            raise NotPermitted("the server computes on no GPU")
        gpu_bytes = max(terms.layout(size, 0, 0).gpu_end for size in terms.sizes)
        gpu = GpuMemory.create(gpu_bytes, terms.device) if on_gpu else None
        try:
            segment = await Segment.open(
                transport.address,
                registration,
                _segment_bytes(terms, on_gpu=on_gpu),
                reply_room(terms.experts),
                gpu=gpu,
                posted_by_gpu=True,
            )
        finally:
            if gpu is not None:
                os.close(gpu[1])
        return cls(member, segment, terms, None if gpu is None else gpu[0])

    @property
    def ended(self) -> bool:
        return self._segment.ended

    def places(self) -> npt.NDArray[np.int64]:
        """[classes, FIELDS], see `kernels`."""
        return np.array([self._place(index, size) for index, size in enumerate(self._terms.sizes)], np.int64)

    def nudge(self) -> None:
        """Wake the server, as a call is about to be posted."""
        self._segment.lane.nudge()

    def wait(self) -> None:
        """Have the device's current stream wait for an answer, without a kernel that takes the server's place there."""
        if self._pinned:
            wait_for(torch.cuda.current_stream(self._terms.device), self._base + kernels.ANSWERED.value)

    def look(self, now: float) -> ExpertdError | None:
        """End what will not be answered any more; why, if it was not ended before. `now` is on the monotonic clock."""
        posted, before = self._word(kernels.TAIL), self._word(kernels.OVER)
        if self._segment.ended:
            self._give_up(GONE)
        elif self._is_answered(posted) or posted != self._waits_since[0]:
            self._waits_since = posted, now
        elif now - self._waits_since[1] > self._terms.timeout:
            self._give_up(TOO_LATE)
            self._segment.close()
        return None if before or not self._word(kernels.OVER) else self._why_over()

    def _is_answered(self, posted: int) -> bool:
        """Whether the server has nothing to answer, even if the GPU has not come to look at it."""
        return posted == self._word(kernels.ENDED) or self._word(kernels.ANSWERED) == 1

    def take_failure(self) -> Failure | None:
        """What became of the first call that failed since this was asked last; the GPU has done what was enqueued."""
        verdict, slot = self._word(kernels.TOLD), self._word(kernels.TOLD_SLOT)
        if verdict == 0:
            return None
        self._words[kernels.TOLD.value // 4] = 0
        if verdict == kernels.NOBODY_OWNS.value:
            layer = self._terms.layers[slot]
            unknown = UnknownExpert(
                f"layer {layer}: topk_ids names experts that no server has, or none of 0 to {self._terms.experts - 1}"
            )
            return Failure(unknown, is_of_server=False)
        layer = self._terms.layers[(slot - self._slots) // self._slot_bytes // len(self._terms.sizes)]
        error = self._error(verdict, slot)
        text = str(error).removeprefix(f"{self.address}: ")
        named = type(error)(f"{self.address}: layer {layer}: {text}", retry_after=error.retry_after)
        return Failure(named, is_of_server=True)

    def close(self) -> None:
        """End it. What the GPU still waits for is released, as long as it is looked at."""
        self._segment.close()
        self._give_up(GONE)

    def release_gpu(self) -> None:
        """The GPU writes no more hidden states to it, and reads no sums."""
        self._gpu = None
        self._segment.release_gpu()

    def unpin(self) -> None:
        """Neither does it post or wait."""
        if self._pinned:
            self._pinned = False
            torch.cuda.cudart().cudaHostUnregister(self._base)

    def _error(self, verdict: int, slot: int) -> ExpertdError:
        if verdict == kernels.RECEIPT_DIFFERS.value:
            return ServerFault("the receipt is not that of the pairs that were sent; none of the sums was used")
        if verdict == kernels.NOBODY_ANSWERS.value:
            return self._why_over()
        begin = aligned(slot + ALIGNMENT + self._word(slot + SLOT_REQUEST))
        reply = self._segment.memory[begin : begin + self._word(slot + SLOT_REPLY)]
        error = codec.parse_response(bytes(reply)).error
        if error is None:
            # Answered meanwhile, by a later call.
            return error_from_status(verdict, "a call was refused; a later call's answer is where the reason was")
        return codec.read_error(error)

    def _why_over(self) -> ExpertdError:
        if self._word(kernels.OVER) == TOO_LATE:
            return Unavailable(f"no answer came within {self._terms.timeout:g} s; the server was given up")
        return self._segment.end_error()

    def _give_up(self, why: int) -> None:
        if self._word(kernels.OVER) == 0:
            self._words[kernels.OVER.value // 4] = why
        # Again and again: a call that was being posted at the time has changed it afterwards.
        self._words[kernels.ANSWERED.value // 4] = 1

    def _word(self, at: object) -> int:
        return int(self._words[int(getattr(at, "value", at)) // 4])  # type: ignore[call-overload]

    @property
    def _slot_bytes(self) -> int:
        return slot_bytes(self._terms)

    def _place(self, index: int, size: int) -> list[int]:
        gpu = self._gpu
        layout = self._terms.layout(size, self._tensors, None if gpu is None else 0)
        there = self._base if gpu is None else gpu.address
        return [
            self._base,
            int(self._words[ENTRIES_AT // 4]),
            self._slots + index * self._slot_bytes,
            size,
            there + layout.hidden.start,
            there + layout.hidden_scales.start,
            self._base + layout.expert_ids.start,
            self._base + layout.weights.start,
            there + layout.partials.start,
        ]

    def _write_slots(self) -> None:
        terms, room = self._terms, reply_room(self._terms.experts)
        calls = [(layer, size) for layer in terms.layers for size in terms.sizes]
        for index, (layer, size) in enumerate(calls):
            slot = self._slots + index * self._slot_bytes
            message = terms.encode(index + 1, layer, size, self._tensors, 0 if self.on_gpu else None)
            self._words[slot // 4 + 1 : slot // 4 + 3] = len(message), room
            begin = slot + ALIGNMENT
            self._segment.memory[begin : begin + len(message)] = message

    def _pin(self) -> bool:
        with on_device(self._terms.device):
            code = int(torch.cuda.cudart().cudaHostRegister(self._base, len(self._segment.memory), 0))
        if code != 0:
            raise ServerFault(f"the {len(self._segment.memory)} bytes shared cannot be pinned: CUDA error {code}")
        return True


def _parts(data: int, terms: Terms) -> tuple[int, int]:
    """Where in a segment slots and tensors begin."""
    slots = aligned(data)
    return slots, aligned(slots + len(terms.layers) * len(terms.sizes) * slot_bytes(terms), GPU_ALIGNMENT)


def _segment_bytes(terms: Terms, *, on_gpu: bool) -> int:
    gpu_offset = 0 if on_gpu else None
    tensors = max(terms.layout(size, 0, gpu_offset).end for size in terms.sizes)
    return segment_bytes(_parts(0, terms)[1] + GPU_ALIGNMENT + tensors)
