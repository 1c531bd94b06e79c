"""A caller that shares memory with a server by the letter of the contract, as a stranger would."""

import asyncio
import contextlib
import fcntl
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from expertd.kernels.numerics.backend import TokenBatch
from expertd.proto import codec
from expertd.proto import expert_shard_pb2 as pb
from expertd.server.app import Server
from tests.support.serving import execute_method, open_channel, random_batch, request_for

SEGMENT_BYTES = 1 << 16
BATCH = random_batch(4, hidden=256, experts=16, top_k=4, absent=0.0)
OK, INVALID = 0, grpc.StatusCode.INVALID_ARGUMENT.value[0]
PLACES = {"hidden": 0, "hidden_scales": 1024, "expert_ids": 1088, "weights": 1152}
"""Where the tensors of BATCH lie: 1024, 32, 64 and 64 bytes, each from a multiple of 64."""
PARTIALS = 1216


def sealed_memory(size: int = SEGMENT_BYTES, seals: int = fcntl.F_SEAL_SHRINK, flags: int = 0) -> int:
    descriptor = os.memfd_create("test-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


async def registration_of(server: Server) -> pb.RegisterSharedMemoryResponse:
    async with open_channel(server) as channel:
        method: Any = channel.unary_unary(
            f"/{codec.SERVICE}/RegisterSharedMemory",
            pb.RegisterSharedMemoryRequest.SerializeToString,
            pb.RegisterSharedMemoryResponse.FromString,
        )
        answer: pb.RegisterSharedMemoryResponse = await method(pb.RegisterSharedMemoryRequest())
        return answer


@dataclass
class Caller:
    """A connection that speaks the contract with the generated classes, its segment reached by pread and pwrite."""

    descriptor: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self) -> pb.ExecuteResponse:
        async with asyncio.timeout(20):
            length = int.from_bytes(await self.reader.readexactly(4), "little")
            return pb.ExecuteResponse.FromString(await self.reader.readexactly(length))

    def send(self, request: pb.ExecuteRequest | bytes) -> None:
        message = request if isinstance(request, bytes) else request.SerializeToString()
        self.writer.write(len(message).to_bytes(4, "little") + message)

    async def ask(self, request: pb.ExecuteRequest | bytes) -> pb.ExecuteResponse:
        self.send(request)
        return await self.answer()

    def place(self, request: pb.ExecuteRequest, offset: int = 0) -> pb.ExecuteRequest:
        """Move the request's tensors to the segment."""
        for field, place in PLACES.items():
            os.pwrite(self.descriptor, getattr(request, field), offset + place)
            request.ClearField(field)
        request.segment_offset = offset
        return request


@contextlib.asynccontextmanager
async def handing_over(
    server: Server, descriptors: list[int], ticket: bytes | None = None, gpu_bytes: int | None = None
) -> AsyncIterator[Caller]:
    registration = await registration_of(server)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("\0" + registration.socket.removeprefix("@"))
    size = b"" if gpu_bytes is None else gpu_bytes.to_bytes(8, "little")
    socket.send_fds(connection, [(registration.ticket if ticket is None else ticket) + size], descriptors)
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    try:
        yield Caller(descriptors[0] if descriptors else -1, reader, writer)
    finally:
        writer.close()
        for descriptor in descriptors:
            os.close(descriptor)


@contextlib.asynccontextmanager
async def accepted(server: Server) -> AsyncIterator[Caller]:
    async with handing_over(server, [sealed_memory()]) as caller:
        assert (await caller.answer()) == pb.ExecuteResponse()
        yield caller


async def over_grpc(server: Server, batch: TokenBatch = BATCH) -> pb.ExecuteResponse:
    async with open_channel(server) as channel:
        answer: pb.ExecuteResponse = await execute_method(channel)(request_for(server, batch))
        return answer
