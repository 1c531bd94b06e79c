"""Shared memory as a stranger would offer it: the contract by its letter, and everything that must be refused."""

import asyncio
import contextlib
import fcntl
import gc
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
import torch

from expertd.proto import expert_shard_pb2 as pb
from expertd.server.app import Server
from expertd.server.local.door import LocalDoor
from tests.support.local_caller import (
    BATCH,
    DATA,
    INVALID,
    OK,
    PARTIALS,
    PLACES,
    SEGMENT_BYTES,
    Handover,
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


def all_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:expertd")


@pytest.fixture(autouse=True)
def others() -> None:
    """What earlier tests have not given back is not this one's."""
    gc.collect()
    OTHERS[:] = [all_mappings()]


OTHERS = [0]


def mappings() -> int:
    """Segments mapped here since the test began, but for the one of the caller itself."""
    return all_mappings() - OTHERS[0] - 1


async def test_partials_and_receipt_are_those_of_grpc_bit_for_bit(server: Server) -> None:
    expected = await over_grpc(server)
    async with accepted(server) as caller:
        for offset in (0, 64 * 500, 64 * 129):
            answer = await caller.ask(caller.place(request_for(server, BATCH, request_id=9), offset))
            assert (answer.request_id, answer.error.code, answer.partials) == (9, OK, b"")
            assert caller.partials(offset) == expected.partials
            assert answer.receipt_experts == expected.receipt_experts
            assert answer.receipt_pairs == expected.receipt_pairs


async def test_what_was_checked_is_what_is_computed_whatever_the_caller_writes_meanwhile(server: Server) -> None:
    expected = await over_grpc(server)
    gate = Gate(server)
    async with accepted(server) as caller:
        asking = asyncio.create_task(caller.ask(caller.place(request_for(server, BATCH))))
        await until(lambda: bool(gate.reached))
        for field, length in (("hidden_scales", 32), ("expert_ids", 64), ("weights", 64)):
            caller.write(b"\xff" * length, PLACES[field])
        gate.open()
        assert (await asking).error.code == OK
        assert caller.partials() == expected.partials


async def test_nan_codes_stay_within_their_tokens(server: Server) -> None:
    expected = torch.frombuffer(bytearray((await over_grpc(server)).partials), dtype=torch.float32).view(4, 256)
    async with accepted(server) as caller:
        request = caller.place(request_for(server, BATCH))
        caller.write(b"\xff" * 256, PLACES["hidden"] + 256)
        await caller.ask(request)
        partials = torch.frombuffer(bytearray(caller.partials()), dtype=torch.float32)
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
    "in the ring": (edited(lambda r: setattr(r, "segment_offset", DATA - 64)), "the segment's data begin at byte 5120"),
    "far beyond": (edited(lambda r: setattr(r, "segment_offset", 2**64 - 64)), "end at byte 18446744073709556864"),
    "unaligned": (edited(lambda r: setattr(r, "segment_offset", 65)), "segment_offset is 65; it must be a multiple of"),
    "sums in the ring": (
        edited(lambda r: setattr(r, "sums_offset", DATA - 64)),
        "sums_offset is 5056; the segment's data begin at byte 5120",
    ),
    "sums past the end": (
        edited(lambda r: setattr(r, "sums_offset", SEGMENT_BYTES - 64)),
        "sums_offset is 65472 and the partials end at byte 69568; the segment has 65536",
    ),
    "sums far beyond": (edited(lambda r: setattr(r, "sums_offset", 2**64 - 64)), "end at byte 18446744073709555648"),
    "sums unaligned": (
        edited(lambda r: setattr(r, "sums_offset", DATA + 65)),
        "sums_offset is 5185; it must be a multiple of 64",
    ),
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


async def test_a_ring_that_breaks_the_rules_ends_the_lane_with_the_reason(server: Server) -> None:
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    async with accepted(server) as caller:
        tail = 64
        caller.memory[tail : tail + 4] = (1000).to_bytes(4, "little")
        await over_grpc(server)  # For the server to look.
        await until(caller.ended)
        answer = pb.ExecuteResponse.FromString(caller.lane.reason)
        assert (answer.request_id, answer.error.code) == (0, INVALID)
        await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    async with accepted(server) as caller:
        assert (await caller.ask(caller.place(request_for(server, BATCH)))).error.code == OK


async def test_what_begins_as_no_lane_is_refused(server: Server) -> None:
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    wrong = sealed_memory()
    os.pwrite(wrong, bytes(4), 8)
    for descriptor, complaint in (
        (wrong, "the segment begins with no lane of version 3"),
        (sealed_memory(4096), "the ring is at 4096 and the data at 5120 of 4096 bytes"),
    ):
        async with handing_over(server, [descriptor]) as caller:
            error = (await caller.answer()).error
            assert error.code == INVALID
            assert complaint in error.message
            assert await caller.reader.read() == b""
    assert door(server, LocalDoor).mapped_bytes == 0


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
            os.ftruncate(caller.lane.descriptor, 0)


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
    answer = await Handover(reader, writer).answer()
    assert answer.error.message == "no ticket came within 0.05 s"
    assert await reader.read() == b""
    writer.close()


async def test_a_closed_connection_gives_its_memory_back_even_with_calls_in_flight(server: Server) -> None:
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    gate = Gate(server)
    other = asyncio.create_task(over_grpc(server))
    await until(lambda: bool(gate.reached))
    async with accepted(server) as caller:
        assert (door(server, LocalDoor).mapped_bytes, mappings()) == (SEGMENT_BYTES, 1)
        caller.send(caller.place(request_for(server, BATCH, layer=2)))
        await until(lambda: server.engine.queued_tokens == BATCH.num_tokens)
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    assert (mappings(), server.engine.queued_tokens) == (0, 0)
    gate.open()
    await other
    assert gate.reached == [1]


async def test_memory_of_a_closed_connection_is_given_back_only_when_the_device_is_done_with_it(server: Server) -> None:
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    gate = Gate(server)
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
        gate = Gate(server)
        async with accepted(server) as caller:
            asking = asyncio.create_task(caller.ask(caller.place(request_for(server, batch))))
            await until(lambda: bool(gate.reached))
            server.stop()
            await asyncio.sleep(0.5)
            assert not caller.ended()
            gate.open()
            assert (await asking).error.code == OK
            await until(caller.ended)
            assert caller.lane.reason == b""


async def test_drain_ends_what_is_not_answered_in_time(small_model: Path) -> None:
    options = {"shared_memory_bytes": 1 << 20, "drain_seconds": 0.3}
    async with running_server(small_model, range(16), **options) as server:
        gate = Gate(server)
        async with accepted(server) as caller:
            caller.send(caller.place(request_for(server, BATCH)))
            await until(lambda: bool(gate.reached))
            server.stop()
            await until(caller.ended)
            assert (door(server, LocalDoor).mapped_bytes, mappings()) == (SEGMENT_BYTES, 1)
            gate.open()
            await until(lambda: door(server, LocalDoor).mapped_bytes == 0)


async def test_a_process_has_a_bounded_part(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    async with contextlib.AsyncExitStack() as lanes:
        for _ in range(8):
            await lanes.enter_async_context(accepted(server))
        async with handing_over(server, [sealed_memory()]) as caller:
            error = (await caller.answer()).error
        assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        part = f"of the half of --shared-memory-bytes that process {os.getpid()} may have"
        assert error.message == f"the segment has 65536 bytes; 0 are left {part}"
        monkeypatch.setattr("expertd.server.local.door.peer_of", lambda connection: (77, os.geteuid()))
        async with accepted(server) as other:
            assert (await other.ask(other.place(request_for(server, BATCH)))).error.code == OK
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    async with accepted(server):
        pass


async def test_callers_that_have_no_process_id_here_have_a_part_each(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    monkeypatch.setattr("expertd.server.local.door.peer_of", lambda connection: (0, os.geteuid()))
    async with contextlib.AsyncExitStack() as lanes:
        for _ in range(9):
            await lanes.enter_async_context(accepted(server))


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
            with contextlib.suppress(ConnectionError, AssertionError):
                async with accepted(server):
                    pass
        await until(lambda: counted("expertd_background_restarts_total") == 1)
        assert counted("expertd_background_errors_total") == 1
        assert "accepting local connections failed and begins again" in caplog.text
        assert "LookupError: a bug" in caplog.text
        async with accepted(server) as caller:
            assert (await caller.ask(caller.place(request_for(server, BATCH)))).error.code == OK
