"""GPU memory as a stranger would offer it, with a stand-in for the GPU: the contract by its letter, and refusals."""

import gc
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from expertd.proto import expert_shard_pb2 as pb
from expertd.server.app import Server
from expertd.server.local.door import LocalDoor
from tests.support.local_caller import (
    BATCH,
    DATA,
    INVALID,
    OK,
    Caller,
    accepted,
    handing_over,
    over_grpc,
    registration_of,
    sealed_memory,
)
from tests.support.native import stand_in_gpu
from tests.support.serving import door, request_for, running_server, until

GPU_BYTES = 1 << 16
GPU_PLACES = {"hidden": 0, "hidden_scales": 1024}
SEGMENT_PLACES = {"expert_ids": 0, "weights": 64}
PARTIALS = 1280


@pytest_asyncio.fixture(loop_scope="module")
async def server(small_model: Path) -> AsyncIterator[Server]:
    async with running_server(small_model, range(16), shared_memory_bytes=1 << 20) as server:
        yield server


pytestmark = pytest.mark.asyncio(loop_scope="module")


def gpu_memory(size: int = GPU_BYTES) -> int:
    return stand_in_gpu.StandInMemory.create(size, stand_in_gpu.DEVICE)[1]


def placed(request: pb.ExecuteRequest, caller: Caller, gpu: int, offset: int, gpu_offset: int) -> pb.ExecuteRequest:
    """Move the request's tensors to the segment, `offset` bytes into its data, and to GPU memory."""
    for field, place in GPU_PLACES.items():
        os.pwrite(gpu, getattr(request, field), gpu_offset + place)
    for field, place in SEGMENT_PLACES.items():
        caller.write(getattr(request, field), offset + place)
    for field in (*GPU_PLACES, *SEGMENT_PLACES):
        request.ClearField(field)
    request.segment_offset, request.gpu_offset = DATA + offset, gpu_offset
    return request


def stand_ins() -> int:
    return Path("/proc/self/maps").read_text().count(f"memfd:{stand_in_gpu.NAME}")


async def test_partials_are_those_of_grpc_bit_for_bit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_gpu.install(monkeypatch, server)
    assert (await registration_of(server)).gpu == stand_in_gpu.UUID
    expected = await over_grpc(server)
    gpu = gpu_memory()
    async with accepted(server, gpu, GPU_BYTES) as caller:
        for offset, gpu_offset in ((0, 0), (64 * 500, 256 * 7), (64, GPU_BYTES - PARTIALS - 4096)):
            request = placed(request_for(server, BATCH, request_id=9), caller, gpu, offset, gpu_offset)
            answer = await caller.ask(request)
            assert (answer.request_id, answer.error.code, answer.partials) == (9, OK, b"")
            assert os.pread(gpu, 4096, gpu_offset + PARTIALS) == expected.partials
            assert (answer.receipt_experts, answer.receipt_pairs) == (expected.receipt_experts, expected.receipt_pairs)
        request.gpu_offset += 256
        refused = await caller.ask(request)
        assert refused.error.code == INVALID
        assert "the call's tensors end at byte 65792; the GPU memory has 65536" in refused.error.message
        request.gpu_offset -= 256
        assert (await caller.ask(request)).error.code == OK


async def test_the_engine_learns_whose_memory_it_is(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_gpu.install(monkeypatch, server)
    seen: list[bool] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:  # noqa: ANN401
            return getattr(engine, name)

        def add_lane(self, *given: Any, of_peer: bool, **named: Any) -> int:  # noqa: ANN401
            seen.append(of_peer)
            return engine.add_lane(*given, of_peer=of_peer, **named)

    engine = door(server, LocalDoor)._engine
    monkeypatch.setattr(door(server, LocalDoor), "_engine", Watched())
    expected = await over_grpc(server)
    for uuid in ("", stand_in_gpu.UUID, "GPU-other"):
        gpu = gpu_memory()
        async with accepted(server, gpu, GPU_BYTES, uuid) as caller:
            answer = await caller.ask(placed(request_for(server, BATCH), caller, gpu, 0, 0))
            assert (answer.error.code, os.pread(gpu, 4096, PARTIALS)) == (OK, expected.partials)
    assert seen == [False, False, True]


async def test_a_closed_connection_gives_the_memory_back_on_the_device_thread(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_gpu.install(monkeypatch, server)
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    gpu = gpu_memory()
    gc.collect()
    unmapped_by = stand_in_gpu.StandInMemory.unmapped_by
    unmapped_by.clear()
    async with accepted(server, gpu, GPU_BYTES):
        assert door(server, LocalDoor).mapped_bytes == 2 * GPU_BYTES
        gc.collect()
        assert unmapped_by == []
        assert stand_ins() > 0
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    assert unmapped_by == ["device-owner"]
    await until(lambda: stand_ins() == 0)


def descriptors() -> int:
    """Of memory, open in this process."""
    return sum(
        str(link.readlink()).startswith("/memfd:") for link in Path("/proc/self/fd").iterdir() if link.is_symlink()
    )


async def refusal(server: Server, descriptors: list[int], gpu_bytes: int) -> tuple[int, str]:
    async with handing_over(server, descriptors, gpu_bytes=gpu_bytes) as caller:
        answer = await caller.answer()
        assert await caller.reader.read() == b""
        return answer.error.code, answer.error.message


async def test_memory_that_cannot_be_mapped_or_is_too_much_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in_gpu.install(monkeypatch, server)
    await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
    # A log that is kept keeps errors, and with them what was mapped where they were raised.
    caplog.set_level(logging.ERROR, "expertd.server.local.door")
    gc.collect()
    before = descriptors()
    code, message = await refusal(server, [sealed_memory(), gpu_memory()], 2 * GPU_BYTES)
    assert code == INVALID
    assert message.startswith("the 131072 bytes of GPU memory cannot be mapped: cuMemMap")
    code, message = await refusal(server, [sealed_memory(), gpu_memory()], 1 << 40)
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert message == "the segment has 1099511693312 bytes; 1048576 are left of --shared-memory-bytes"
    for handed_over, said in (([sealed_memory(), gpu_memory()], 0), ([sealed_memory()], GPU_BYTES)):
        code, message = await refusal(server, handed_over, said)
        assert code == INVALID
        assert "the second one and the size belong together" in message
    assert door(server, LocalDoor).mapped_bytes == 0
    gc.collect()
    assert descriptors() == before


async def test_a_server_without_a_gpu_says_so(server: Server) -> None:
    assert (await registration_of(server)).gpu == ""
    code, message = await refusal(server, [sealed_memory(), gpu_memory()], GPU_BYTES)
    assert code == grpc.StatusCode.PERMISSION_DENIED.value[0]
    assert message == "this server computes on no GPU; hand over the segment alone"


async def test_gpu_offsets_need_gpu_memory(server: Server) -> None:
    async with accepted(server) as caller:
        request = caller.place(request_for(server, BATCH))
        request.gpu_offset = 0
        answer = await caller.ask(request)
        assert answer.error.code == INVALID
        assert answer.error.message == "gpu_offset is 0; no GPU memory was handed over with the segment"
        request.ClearField("gpu_offset")
        assert (await caller.ask(request)).error.code == OK
