"""A caller that shares memory with a server by the letter of the contract, as a stranger would."""

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from expertd._native import ClientLane
from expertd.kernels.numerics.backend import TokenBatch
from expertd.proto import codec
from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.lane.layout import LANE_VERSION
from expertd.server.app import Server
from tests.support.serving import execute_method, open_channel, random_batch, request_for

SEGMENT_BYTES = 1 << 16
ENTRIES = 64
DATA = 4096 + 16 * ENTRIES
"""Where a lane's data begin."""
SLOTS, SLOT_BYTES = 3 << 14, 2048
"""Where slots are, behind the tensors, and what each has."""
REPLY_ROOM = 1024 + 8 * 16
BATCH = random_batch(4, hidden=256, experts=16, top_k=4, absent=0.0)
OK, INVALID = 0, grpc.StatusCode.INVALID_ARGUMENT.value[0]
PLACES = {"hidden": 0, "hidden_scales": 1024, "expert_ids": 1088, "weights": 1152}
"""Where the tensors of BATCH lie: 1024, 32, 64 and 64 bytes, each from a multiple of 64."""
PARTIALS = 1216


def sealed_memory(size: int = SEGMENT_BYTES, seals: int = fcntl.F_SEAL_SHRINK, flags: int = 0) -> int:
    """A segment that begins as a lane does."""
    descriptor = os.memfd_create("test-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(descriptor, size)
    if size and not flags:
        os.pwrite(descriptor, struct.pack("<8sIIQQ", b"expertdL", LANE_VERSION, ENTRIES, 4096, DATA), 0)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


async def registration_of(server: Server, gpu: str = "") -> pb.RegisterSharedMemoryResponse:
    async with open_channel(server) as channel:
        method: Any = channel.unary_unary(
            f"/{codec.SERVICE}/RegisterSharedMemory",
            pb.RegisterSharedMemoryRequest.SerializeToString,
            pb.RegisterSharedMemoryResponse.FromString,
        )
        answer: pb.RegisterSharedMemoryResponse = await method(pb.RegisterSharedMemoryRequest(gpu=gpu))
        return answer


@dataclass
class Handover:
    """A connection that begins."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self) -> pb.ExecuteResponse:
        """What the server says of the memory."""
        async with asyncio.timeout(20):
            length = int.from_bytes(await self.reader.readexactly(4), "little")
            return pb.ExecuteResponse.FromString(await self.reader.readexactly(length))


@dataclass
class Caller:
    """A lane that speaks the contract with the generated classes."""

    lane: ClientLane
    slots: dict[int, int] = field(default_factory=dict)
    """Those in flight, with their request ids."""

    def __post_init__(self) -> None:
        self.memory = memoryview(self.lane.memory)

    async def answer(self) -> pb.ExecuteResponse:
        """The next one; ConnectionError once the lane has ended."""
        async with asyncio.timeout(20):
            while True:
                ended = self.ended()
                for slot in self.slots:
                    reply = self.lane.reply(slot)
                    if reply is not None:
                        del self.slots[slot]
                        return pb.ExecuteResponse.FromString(reply)
                if ended:
                    raise ConnectionError("the lane has ended")
                await asyncio.sleep(0.002)

    def ended(self) -> bool:
        self.lane.poll()
        return self.lane.ended

    def send(self, request: pb.ExecuteRequest | bytes) -> int:
        """Post it; its slot."""
        message = request if isinstance(request, bytes) else request.SerializeToString()
        slot = next(slot for slot in range(SLOTS, SEGMENT_BYTES, SLOT_BYTES) if slot not in self.slots)
        assert self.lane.post(slot, message, REPLY_ROOM)
        self.slots[slot] = 0 if isinstance(request, bytes) else request.request_id
        return slot

    async def ask(self, request: pb.ExecuteRequest | bytes) -> pb.ExecuteResponse:
        self.send(request)
        return await self.answer()

    def cancel(self, request_id: int) -> None:
        for slot in [slot for slot, sent in self.slots.items() if sent == request_id]:
            self.lane.cancel(slot)

    def place(self, request: pb.ExecuteRequest, offset: int = 0) -> pb.ExecuteRequest:
        """Move the request's tensors to the segment, `offset` bytes into its data."""
        for field_, place in PLACES.items():
            self.write(getattr(request, field_), offset + place)
            request.ClearField(field_)
        request.segment_offset = DATA + offset
        return request

    def write(self, tensor: bytes, offset: int) -> None:
        start = DATA + offset
        self.memory[start : start + len(tensor)] = tensor

    def partials(self, offset: int = 0) -> bytes:
        """Of a request that was placed at `offset`."""
        start = DATA + offset + PARTIALS
        return bytes(self.memory[start : start + 4096])


async def connect(registration: pb.RegisterSharedMemoryResponse) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, "\0" + registration.socket.removeprefix("@"))
    return connection


@contextlib.asynccontextmanager
async def handing_over(
    server: Server, descriptors: list[int], ticket: bytes | None = None, gpu_bytes: int | None = None
) -> AsyncIterator[Handover]:
    registration = await registration_of(server)
    connection = await connect(registration)
    size = b"" if gpu_bytes is None else gpu_bytes.to_bytes(8, "little")
    socket.send_fds(connection, [(registration.ticket if ticket is None else ticket) + size], descriptors)
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    try:
        yield Handover(reader, writer)
    finally:
        writer.close()
        for descriptor in descriptors:
            os.close(descriptor)


@contextlib.asynccontextmanager
async def accepted(server: Server, gpu: int | None = None, gpu_bytes: int = 0, uuid: str = "") -> AsyncIterator[Caller]:
    """A lane, and memory of the GPU `uuid`, so many bytes of it, beside it if there is a descriptor."""
    registration = await registration_of(server, uuid)
    connection = await connect(registration)
    lane = ClientLane(SEGMENT_BYTES, ENTRIES, 0)
    ticket = registration.ticket + (b"" if gpu is None else gpu_bytes.to_bytes(8, "little"))
    socket.send_fds(connection, [ticket], [lane.descriptor, *([] if gpu is None else [gpu])])
    with connection:
        async with asyncio.timeout(20):
            # Only so far: what comes next is the lane's.
            assert await asyncio.get_running_loop().sock_recv(connection, 4) == bytes(4)
        lane.connect(connection.detach())
    try:
        yield Caller(lane)
    finally:
        lane.close()


async def over_grpc(server: Server, batch: TokenBatch = BATCH) -> pb.ExecuteResponse:
    async with open_channel(server) as channel:
        answer: pb.ExecuteResponse = await execute_method(channel)(request_for(server, batch))
        return answer
