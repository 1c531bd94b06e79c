"""What coordinators and their transports give up costs the servers nothing."""

import asyncio
import gc
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from expertd.client.coordinator import Coordinator
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import DeadlineExceeded, Unavailable
from expertd.proto.codec import ExecuteCall, ExecuteResult
from expertd.server.app import Server
from tests.support.coordinators import EXACT, call, expected, free_bytes, segments_of
from tests.support.fleets import addresses
from tests.support.serving import Gate, call_for, count_of, random_batch, running_server, until

ALL = range(16)
BATCH = random_batch(5, 256, 16, 4)
LAYER, OTHER_LAYER = 1, 2


@pytest_asyncio.fixture(params=["stream", "shared-memory"])
async def connected(
    request: pytest.FixtureRequest, small_model: Path
) -> AsyncIterator[tuple[Server, GrpcTransport | SharedMemoryTransport]]:
    async with running_server(small_model, ALL) as server:
        grpc = GrpcTransport(str(server.address))
        transport = grpc if request.param == "stream" else SharedMemoryTransport(grpc, 1 << 20)
        await transport.get_shard(5.0)
        yield server, transport
        await transport.close()


def begin(
    server: Server, transport: GrpcTransport | SharedMemoryTransport, number: int, layer: int, timeout: float = 20.0
) -> asyncio.Task[ExecuteResult]:
    call = call_for(server, BATCH, request_id=number, layer=layer, timeout=timeout)
    return asyncio.create_task(transport.execute(call))


async def give_up_under_way(server: Server, transport: GrpcTransport | SharedMemoryTransport, gate: Gate) -> None:
    """Begin request 1 and cancel it when the device has it."""
    unwanted = begin(server, transport, 1, LAYER)
    await until(lambda: gate.reached == [LAYER])
    unwanted.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unwanted


def all_free(transport: GrpcTransport | SharedMemoryTransport) -> bool:
    gc.collect()
    segments = segments_of(transport) if isinstance(transport, SharedMemoryTransport) else []
    return all(free_bytes(segment) == segment.size for segment in segments)


@pytest.mark.parametrize("late", [False, True], ids=["cancelled", "timed-out"])
async def test_a_call_given_up_leaves_the_servers_queue_at_once(
    connected: tuple[Server, GrpcTransport | SharedMemoryTransport], late: bool
) -> None:
    server, transport = connected
    gate = Gate(server)
    running = begin(server, transport, 1, LAYER)
    await until(lambda: gate.reached == [LAYER])
    unwanted = begin(server, transport, 2, OTHER_LAYER, timeout=1.0 if late else 20.0)
    await until(lambda: server.engine.queued_tokens == BATCH.num_tokens)
    if not late:
        unwanted.cancel()
    with pytest.raises(DeadlineExceeded if late else asyncio.CancelledError):
        await unwanted
    await until(lambda: server.engine.queued_tokens == 0)
    gate.open()
    await running
    assert gate.reached == [LAYER]
    assert (count_of(server, "ok"), count_of(server, "cancelled")) == (1, 1)
    del running, unwanted
    await until(lambda: all_free(transport))


async def test_a_call_given_up_under_way_keeps_its_slot_until_the_device_is_done(
    connected: tuple[Server, GrpcTransport | SharedMemoryTransport],
) -> None:
    server, transport = connected
    gate = Gate(server)
    await give_up_under_way(server, transport, gate)
    await asyncio.sleep(0.2)
    assert all_free(transport) == isinstance(transport, GrpcTransport)
    gate.open()
    await until(lambda: all_free(transport))
    assert (await begin(server, transport, 2, LAYER)).request_id == 2
    assert (count_of(server, "ok"), count_of(server, "cancelled")) == (1, 1)


async def test_what_is_given_up_before_it_is_written_is_not_sent(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_server(small_model, ALL) as server:
        transport = GrpcTransport(str(server.address))
        await begin(server, transport, 1, LAYER)
        stream = transport._channels[0]._stream
        assert stream is not None
        may_write, write = asyncio.Event(), stream._call.write

        async def write_late(message: bytes) -> None:
            await may_write.wait()
            await write(message)

        monkeypatch.setattr(stream._call, "write", write_late)
        wanted, unwanted = begin(server, transport, 3, LAYER), begin(server, transport, 2, LAYER)
        await until(lambda: stream._outbox.qsize() == 1)
        unwanted.cancel()
        await asyncio.wait((unwanted,))
        may_write.set()
        await wanted
        assert (count_of(server, "ok"), count_of(server, "cancelled")) == (2, 0)
        await transport.close()


@pytest.mark.parametrize("shared_memory_bytes", [0, 1 << 20], ids=["stream", "shared-memory"])
async def test_the_slower_of_two_hedged_attempts_is_taken_off_its_servers_queue(
    small_model: Path, shared_memory_bytes: int
) -> None:
    config = replace(EXACT, hedge_quantile=0.5, shared_memory_bytes=shared_memory_bytes)
    async with (
        running_server(small_model, ALL) as stuck,
        running_server(small_model, ALL) as sound,
        Coordinator(addresses([stuck, sound]), config) as moe,
    ):
        for _ in range(80):
            await call(moe)
        gate = Gate(stuck)
        # Whichever server is asked first: of many calls at once some are asked of the one that does not answer.
        outputs = await asyncio.gather(*(call(moe) for _ in range(6)))
        assert all(relative_error(output, expected(small_model)) < 1e-5 for output in outputs)
        assert gate.reached
        await until(lambda: stuck.engine.queued_tokens == 0)
        gate.open()
        await until(lambda: stuck.journal.in_flight == 0)
        assert count_of(stuck, "cancelled") >= 1
        assert torch.equal(await call(moe), outputs[0])


class Grudging(GrpcTransport):
    """The first call after `grudges` was set waits for ever, and fails when it is cancelled."""

    grudges = False

    async def execute(self, call: ExecuteCall) -> ExecuteResult:
        if not Grudging.grudges:
            return await super().execute(call)
        Grudging.grudges = False
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise Unavailable("it failed while it was cancelled") from None
        raise AssertionError


async def test_whatever_becomes_of_the_slower_of_two_hedged_attempts_is_nobodys_error(small_model: Path) -> None:
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    async with (
        running_server(small_model, ALL) as first,
        running_server(small_model, ALL) as second,
        Coordinator(addresses([first, second]), replace(EXACT, hedge_quantile=0.5), open_transport=Grudging) as moe,
    ):
        for _ in range(80):
            await call(moe)
        Grudging.grudges = True
        await call(moe)
        assert not Grudging.grudges
        await asyncio.sleep(0.1)
        gc.collect()
    assert complaints == []
