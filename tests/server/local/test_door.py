"""Shared memory as a stranger would offer it: the contract by its letter, and everything that must be refused."""

import asyncio
import contextlib
import fcntl
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch

from expertd.kernels.numerics.backend import TokenBatch
from expertd.proto import codec
from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.lane.frames import MAX_FRAME_BYTES
from expertd.server.app import Server
from expertd.server.local.door import LocalDoor
from expertd.server.scheduling.shard import Shard
from tests.support.serving import (
    Gate,
    door,
    execute_method,
    open_channel,
    random_batch,
    request_for,
    running_server,
    until,
)

SEGMENT_BYTES = 1 << 16
BATCH = random_batch(4, hidden=256, experts=16, top_k=4, absent=0.0)
OK, INVALID = 0, grpc.StatusCode.INVALID_ARGUMENT.value[0]
PLACES = {"hidden": 0, "hidden_scales": 1024, "expert_ids": 1088, "weights": 1152}
"""Where the tensors of BATCH lie: 1024, 32, 64 and 64 bytes, each from a multiple of 64."""
PARTIALS = 1216


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(small_model: Path) -> AsyncIterator[Server]:
    async with running_server(small_model, range(16), shared_memory_bytes=1 << 20) as server:
        yield server


pytestmark = pytest.mark.asyncio(loop_scope="module")


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


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:test-segment")


async def test_partials_and_receipt_are_those_of_grpc_bit_for_bit(server: Server) -> None:
    expected = await over_grpc(server)
    async with accepted(server) as caller:
        for offset in (0, 64 * 500, 64 * 129):
            answer = await caller.ask(caller.place(request_for(server, BATCH, request_id=9), offset))
            assert (answer.request_id, answer.error.code, answer.partials) == (9, OK, b"")
            assert os.pread(caller.descriptor, 4096, offset + PARTIALS) == expected.partials
            assert answer.receipt_experts == expected.receipt_experts
            assert answer.receipt_pairs == expected.receipt_pairs


async def test_what_was_checked_is_what_is_computed_whatever_the_caller_writes_meanwhile(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await over_grpc(server)
    admit = Shard.admit
    async with accepted(server) as caller:

        def overwrite_then_admit(shard: Shard, call: codec.ExecuteCall) -> TokenBatch:
            for field, length in (("hidden_scales", 32), ("expert_ids", 64), ("weights", 64)):
                os.pwrite(caller.descriptor, b"\xff" * length, PLACES[field])
            return admit(shard, call)

        monkeypatch.setattr(Shard, "admit", overwrite_then_admit)
        assert (await caller.ask(caller.place(request_for(server, BATCH)))).error.code == OK
        assert os.pread(caller.descriptor, 4096, PARTIALS) == expected.partials


async def test_nan_codes_stay_within_their_tokens(server: Server) -> None:
    expected = torch.frombuffer(bytearray((await over_grpc(server)).partials), dtype=torch.float32).view(4, 256)
    async with accepted(server) as caller:
        request = caller.place(request_for(server, BATCH))
        os.pwrite(caller.descriptor, b"\xff" * 256, PLACES["hidden"] + 256)
        await caller.ask(request)
        partials = torch.frombuffer(bytearray(os.pread(caller.descriptor, 4096, PARTIALS)), dtype=torch.float32)
    assert partials.view(4, 256)[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(partials.view(4, 256)[others], expected[others])


def edited(edit: Callable[[pb.ExecuteRequest], object]) -> Callable[[pb.ExecuteRequest], pb.ExecuteRequest]:
    def change(request: pb.ExecuteRequest) -> pb.ExecuteRequest:
        edit(request)
        return request

    return change


BAD_REQUESTS: dict[str, tuple[Callable[[pb.ExecuteRequest], pb.ExecuteRequest | bytes], str]] = {
    "past the end": (
        edited(lambda r: setattr(r, "segment_offset", SEGMENT_BYTES - 64)),
        "segment_offset is 65472 and the call's tensors end at byte 70784; the segment has 65536",
    ),
    "the partials alone past the end": (
        edited(lambda r: setattr(r, "segment_offset", SEGMENT_BYTES - PARTIALS - 4096 + 64)),
        "the call's tensors end at byte 65600; the segment has 65536",
    ),
    "far beyond": (edited(lambda r: setattr(r, "segment_offset", 2**64 - 64)), "end at byte 18446744073709556864"),
    "unaligned": (edited(lambda r: setattr(r, "segment_offset", 65)), "segment_offset is 65; it must be a multiple of"),
    "no offset": (edited(lambda r: r.ClearField("segment_offset")), "segment_offset is missing"),
    "tensors beside the offset": (
        edited(lambda r: setattr(r, "weights", b"\0" * 64)),
        "must be empty beside segment_offset",
    ),
    "more tokens than fit": (edited(lambda r: setattr(r, "num_tokens", 4096)), "the segment has 65536"),
    "absurdly many tokens": (edited(lambda r: setattr(r, "num_tokens", 2**32 - 1)), "num_tokens is 4294967295"),
    "unknown dtype": (edited(lambda r: setattr(r, "hidden_dtype", 77)), "hidden_dtype is 77; accepted"),
    "garbage": (lambda _: b"\xff" * 50, "the 50 bytes received are no expertd.v1.ExecuteRequest"),
    "truncated": (lambda r: r.SerializeToString()[:-1], "received are no expertd.v1.ExecuteRequest"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_bad_requests_are_refused_and_the_connection_goes_on(server: Server, name: str) -> None:
    change, message = BAD_REQUESTS[name]
    async with accepted(server) as caller:
        good = caller.place(request_for(server, BATCH))
        bad = pb.ExecuteRequest()
        bad.CopyFrom(good)
        answer = await caller.ask(change(bad))
        assert answer.error.code == INVALID
        assert message in answer.error.message
        assert (await caller.ask(good)).error.code == OK


async def test_refusals_are_those_of_grpc(server: Server) -> None:
    async with accepted(server) as caller, open_channel(server) as channel:
        weights = BATCH.weights.clone()
        weights[1, 2] = torch.nan
        for changes in ({"layer": 9}, {"model_fingerprint": "f00d"}, {"placement_epoch": 1}, {"weights": weights}):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await execute_method(channel)(request_for(server, BATCH, **changes))
            answer = await caller.ask(caller.place(request_for(server, BATCH, **changes)))
            assert (answer.error.code, answer.error.message) == (refused.value.code().value[0], refused.value.details())


async def test_a_segment_offset_over_grpc_is_refused(server: Server) -> None:
    async with open_channel(server) as channel:
        request = request_for(server, BATCH)
        request.segment_offset = 0
        with pytest.raises(grpc.aio.AioRpcError, match="segment_offset is 0; there is no segment") as refused:
            await execute_method(channel)(request)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_frame_that_is_too_long_ends_the_connection_with_the_reason(server: Server) -> None:
    async with accepted(server) as caller:
        caller.writer.write((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
        answer = await caller.answer()
        assert (answer.request_id, answer.error.code) == (0, INVALID)
        assert answer.error.message == f"a frame has {MAX_FRAME_BYTES + 1} bytes; at most {MAX_FRAME_BYTES} are read"
        assert await caller.reader.read() == b""
    async with accepted(server) as caller:
        assert (await caller.ask(caller.place(request_for(server, BATCH)))).error.code == OK


def regular_file() -> int:
    return os.open("/etc/hostname", os.O_RDONLY)


BAD_SEGMENTS: dict[str, tuple[Callable[[], list[int]], grpc.StatusCode, str]] = {
    "none": (lambda: [], grpc.StatusCode.INVALID_ARGUMENT, "no file descriptor came with the ticket"),
    "a file": (lambda: [regular_file()], grpc.StatusCode.INVALID_ARGUMENT, "the segment is no memfd"),
    "a directory": (lambda: [os.open("/", os.O_RDONLY)], grpc.StatusCode.INVALID_ARGUMENT, "the segment is no memfd"),
    "may shrink": (lambda: [sealed_memory(seals=0)], grpc.StatusCode.INVALID_ARGUMENT, "the segment can shrink"),
    "empty": (lambda: [sealed_memory(0)], grpc.StatusCode.INVALID_ARGUMENT, "the segment has 0 bytes"),
    "read-only": (
        lambda: [sealed_memory(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)],
        grpc.StatusCode.INVALID_ARGUMENT,
        "the segment cannot be mapped to read and write",
    ),
    "too large": (
        lambda: [sealed_memory(1 << 40)],
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the segment has 1099511627776 bytes; 1048576 are left of --shared-memory-bytes",
    ),
}


@pytest.mark.parametrize("name", BAD_SEGMENTS)
async def test_bad_segments_are_refused(server: Server, name: str) -> None:
    make, code, message = BAD_SEGMENTS[name]
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    async with handing_over(server, make()) as caller:
        answer = await caller.answer()
        assert answer.error.code == code.value[0]
        assert message in answer.error.message
        assert await caller.reader.read() == b""
    assert door(server, LocalDoor).mapped_bytes == 0


async def test_huge_pages_are_refused(server: Server) -> None:
    try:
        descriptor = sealed_memory(2 << 20, flags=os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"this kernel has no huge pages for memfds: {error}")
    async with handing_over(server, [descriptor]) as caller:
        assert "the segment has huge pages" in (await caller.answer()).error.message


async def test_an_accepted_segment_cannot_shrink(server: Server) -> None:
    async with accepted(server) as caller:
        with pytest.raises(PermissionError):
            os.ftruncate(caller.descriptor, 0)


async def test_tickets_open_one_connection_and_no_other_bytes_do(server: Server) -> None:
    registration = await registration_of(server)
    async with handing_over(server, [sealed_memory()], ticket=registration.ticket) as caller:
        assert await caller.answer() == pb.ExecuteResponse()
    for ticket in (registration.ticket, b"x" * 32, registration.ticket[:31], b"\0"):
        async with handing_over(server, [sealed_memory()], ticket=ticket) as caller:
            answer = await caller.answer()
            assert answer.error.code == grpc.StatusCode.UNAUTHENTICATED.value[0]
            assert "the ticket is unknown, used or too old" in answer.error.message


async def test_processes_of_other_users_are_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd.proto.lane.frames.peer_of", lambda connection: (77, os.geteuid() + 1000))
    async with handing_over(server, [sealed_memory()]) as caller:
        answer = await caller.answer()
        assert answer.error.code == grpc.StatusCode.PERMISSION_DENIED.value[0]
        assert f"process 77 runs as user {os.geteuid() + 1000}" in answer.error.message


async def test_a_silent_connection_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd.server.local.handover.HANDOVER_SECONDS", 0.05)
    registration = await registration_of(server)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("\0" + registration.socket.removeprefix("@"))
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    answer = await Caller(-1, reader, writer).answer()
    assert answer.error.message == "no ticket came within 0.05 s"
    assert await reader.read() == b""
    writer.close()


async def test_a_closed_connection_gives_its_memory_back_even_with_calls_in_flight(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    arrived = asyncio.Event()

    async def hang(*_: object) -> None:
        arrived.set()
        await asyncio.Event().wait()

    async with accepted(server) as caller:
        assert (door(server, LocalDoor).mapped_bytes, mappings()) == (SEGMENT_BYTES, 1)
        monkeypatch.setattr(server.scheduler, "execute", hang)
        caller.send(caller.place(request_for(server, BATCH)))
        await arrived.wait()
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    assert mappings() == 0


async def test_memory_of_a_closed_connection_is_given_back_only_when_the_device_is_done_with_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    gate = Gate(server, monkeypatch)
    async with accepted(server) as caller:
        caller.send(caller.place(request_for(server, BATCH)))
        await until(lambda: bool(gate.reached))
    await asyncio.sleep(0.2)
    assert (door(server, LocalDoor).mapped_bytes, mappings()) == (SEGMENT_BYTES, 1)
    gate.open()
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    assert mappings() == 0


async def test_drain_answers_what_was_read_and_closes(small_model: Path) -> None:
    batch = random_batch(4, 256, 16, 4)
    async with running_server(small_model, range(16), shared_memory_bytes=1 << 20) as server:
        started = asyncio.Event()
        execute = server.scheduler.execute

        async def slowly(*arguments: Any) -> Any:  # noqa: ANN401
            started.set()
            result = await execute(*arguments)
            await asyncio.sleep(0.2)
            return result

        server.scheduler.execute = slowly  # type: ignore[assignment,method-assign]
        async with accepted(server) as caller:
            asking = asyncio.create_task(caller.ask(caller.place(request_for(server, batch))))
            await started.wait()
            server.stop()
            assert (await asking).error.code == OK
            assert await caller.reader.read() == b""


async def test_a_server_with_a_unix_socket_takes_segments_beside_it(small_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "expertd.sock"
    async with running_server(small_model, range(16), unix_socket=path) as server:
        assert (await registration_of(server)).socket == f"{path}.shm"
        assert path.with_name("expertd.sock.shm").is_socket()
    assert not path.with_name("expertd.sock.shm").exists()
