"""Callers whose tensors are on the server's GPU, with a stand-in for it: the same bits, or host memory."""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from expertd.client.transport.gpu_room import GpuRoom
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.shared_memory import FIRST_BYTES, HOST, SharedMemoryTransport
from expertd.kernels.memory.gpu import GpuMemory, GpuMemoryError
from expertd.proto.base.errors import Unavailable
from expertd.server.app import Server
from expertd.server.local.door import LocalDoor
from tests.support.native import stand_in_gpu
from tests.support.native.stand_in_gpu import DEVICE, StandInMemory, StandInStream, as_stream
from tests.support.serving import call_for, door, random_batch, running_server

ALL = range(16)
MIB = 1 << 20


async def connected(server: Server, max_bytes: int = 64 * MIB, first_bytes: int = FIRST_BYTES) -> SharedMemoryTransport:
    transport = SharedMemoryTransport(GrpcTransport(str(server.address)), max_bytes, first_bytes=first_bytes)
    await transport.get_shard(5.0)
    return transport


def gpu_bytes(transport: SharedMemoryTransport) -> list[int]:
    return [segment.size for segment in transport._pools[DEVICE].segments]


async def test_results_are_those_of_host_memory_and_many_calls_share_the_memory(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_server(small_model, ALL) as server:
        calls = [
            call_for(server, random_batch(tokens, 256, 16, 4, seed=tokens), request_id=tokens)
            for tokens in range(1, 60)
        ]
        host = await connected(server, first_bytes=64 << 10)
        expected = [(await host.execute(call)).partials.clone() for call in calls]
        stand_in_gpu.install(monkeypatch, server)
        transport = await connected(server, first_bytes=64 << 10)
        for _ in range(3):
            results = await asyncio.gather(*map(transport.execute, calls))
            assert all(torch.equal(result.partials, right) for result, right in zip(results, expected, strict=True))
            del results
        assert DEVICE in transport.shared_devices
        assert len(gpu_bytes(transport)) > 1
        assert door(server, LocalDoor).mapped_bytes >= sum(gpu_bytes(transport))
        grown = gpu_bytes(transport)
        for call in calls:
            await transport.execute(call)
        assert gpu_bytes(transport) == grown
        await asyncio.gather(transport.close(), host.close())


async def test_without_room_on_the_gpu_tensors_go_through_host_memory(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_server(small_model, ALL) as server:
        stand_in_gpu.install(monkeypatch, server)
        transport = await connected(server, max_bytes=64 << 10)
        small, large = random_batch(2, 256, 16, 4), random_batch(50, 256, 16, 4)
        first = await transport.execute(call_for(server, small))
        assert gpu_bytes(transport) == [64 << 10]
        second = await transport.execute(call_for(server, large))
        assert torch.equal(first.partials, (await transport.execute(call_for(server, small))).partials)
        assert second.partials.isfinite().all()
        assert gpu_bytes(transport) == [64 << 10]
        await transport.close()


class NoMemory(StandInMemory):
    @classmethod
    def create(cls, size: int, device: torch.device) -> tuple[Self, int]:
        raise GpuMemoryError("cuMemCreate: CUDA_ERROR_NOT_SUPPORTED")


class FarCuda(stand_in_gpu.StandInCuda):
    def open(self, descriptor: int, size: int) -> GpuMemory:
        raise GpuMemoryError("the memory is on GPU 1, to which cuda:0 has no peer access")


REFUSALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "a GPU too far": ({"cuda": FarCuda}, logging.WARNING, "to which cuda:0 has no peer access"),
    "CUDA says no": ({"memory": NoMemory}, logging.WARNING, "cuMemCreate: CUDA_ERROR_NOT_SUPPORTED"),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_where_gpu_memory_cannot_be_shared_host_memory_is_and_the_log_says_why_once(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO, "expertd.client")
    refusing, level, reason = REFUSALS[name]
    async with running_server(small_model, ALL) as server:
        stand_in_gpu.install(monkeypatch, server, **refusing)
        transport = await connected(server)
        for _ in range(3):
            assert (await transport.execute(call_for(server, random_batch(2, 256, 16, 4)))).partials.isfinite().all()
        assert transport.shared_devices == {HOST}
        said = [record for record in caplog.records if "no memory of" in record.message]
        assert [record.levelno for record in said] == [level]
        assert "no memory of cuda:0 is shared, its tensors go through host memory: " in said[0].message
        assert reason in said[0].message
        await transport.close()


async def test_a_server_without_a_gpu_is_called_through_host_memory(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "expertd.client")
    async with running_server(small_model, ALL) as server:
        stand_in_gpu.install(monkeypatch, server)
        server.handlers.tickets.gpu = ""
        transport = await connected(server)
        assert (await transport.execute(call_for(server, random_batch(2, 256, 16, 4)))).partials.isfinite().all()
        assert "the server computes on no GPU; the tensors are on GPU-stand-in" in caplog.text
        await transport.close()


async def test_a_call_is_announced_when_its_stream_has_written_the_tensors(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_server(small_model, ALL) as server:
        stream = stand_in_gpu.install(monkeypatch, server)
        transport = await connected(server)
        call = call_for(server, random_batch(2, 256, 16, 4))
        await transport.execute(call)
        stream.busy = True
        # Its time begins when it is announced.
        waiting = asyncio.create_task(transport.execute(replace(call, timeout=5.0)))
        given_up = asyncio.create_task(transport.execute(replace(call, request_id=8)))
        await asyncio.sleep(0.2)
        given_up.cancel()
        await asyncio.wait((waiting, given_up), timeout=0.2)
        assert (server.journal.in_flight, waiting.done(), given_up.cancelled()) == (0, False, True)
        stream.busy = False
        assert (await waiting).partials.isfinite().all()
        await transport.close()


async def test_a_lost_connection_is_made_again(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_server(small_model, ALL) as server:
        stand_in_gpu.install(monkeypatch, server)
        transport = await connected(server)
        call = call_for(server, random_batch(2, 256, 16, 4))
        expected = (await transport.execute(call)).partials.clone()
        door(server, LocalDoor).disconnect()
        with pytest.raises(Unavailable, match="the connection of shared memory was closed"):
            await transport.execute(call)
        async with asyncio.timeout(10):
            while transport.shared_devices:
                await asyncio.sleep(0.01)
        await transport.get_shard(5.0)
        assert torch.equal((await transport.execute(call)).partials, expected)
        assert DEVICE in transport.shared_devices
        assert HOST in transport.shared_devices
        assert gpu_bytes(transport) == [16 * MIB]
        await transport.close()


def test_a_range_is_given_out_again_when_nobody_reads_it() -> None:
    memory, _ = StandInMemory.create(1024, DEVICE)
    room = GpuRoom(memory)  # type: ignore[arg-type]
    reading, other = StandInStream(), as_stream(StandInStream())
    taken = room.take(500, as_stream(reading))
    assert taken is not None
    offset, tensor = taken
    assert (offset, len(tensor)) == (0, 512)
    kept = tensor[100:200]
    assert room.take(513, other) is None
    del taken, tensor
    assert room.take(513, other) is None, "a view is kept"
    reading.busy = True
    del kept
    second = room.take(512, other)
    assert second is not None
    assert second[0] == 512, "its stream still reads the first"
    third = room.take(512, other)
    assert third is not None
    assert third[0] == 0
    assert not reading.busy, "waited for"
