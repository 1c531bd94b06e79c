"""Shared memory as a stranger would offer it: the contract by its letter, and everything that must be refused."""

import asyncio
import contextlib
import fcntl
import os
import socket
from collections.abc import AsyncIterator, Callable
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
from tests.support.local_caller import (
    BATCH,
    INVALID,
    OK,
    PARTIALS,
    PLACES,
    SEGMENT_BYTES,
    Caller,
    accepted,
    handing_over,
    over_grpc,
    registration_of,
    sealed_memory,
)
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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(small_model: Path) -> AsyncIterator[Server]:
    async with running_server(small_model, range(16), shared_memory_bytes=1 << 20) as server:
        yield server


pytestmark = pytest.mark.asyncio(loop_scope="module")


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


async def test_a_door_that_cannot_accept_says_so_and_accepts_again(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: LocalDoor, peer: socket.socket) -> None:
        peer.close()
        raise LookupError("a bug")

    async with running_server(small_model, range(16), shared_memory_bytes=1 << 20) as server:
        counted = server.metrics.registry.get_sample_value
        with monkeypatch.context() as broken:
            broken.setattr(LocalDoor, "_serve", fail)
            with contextlib.suppress(ConnectionError, EOFError, asyncio.IncompleteReadError):
                async with accepted(server):
                    pass
        await until(lambda: counted("expertd_background_restarts_total") == 1)
        assert counted("expertd_background_errors_total") == 1
        assert "accepting local connections failed and begins again" in caplog.text
        assert "LookupError: a bug" in caplog.text
        async with accepted(server) as caller:
            assert (await caller.ask(caller.place(request_for(server, BATCH)))).error.code == OK
