"""Memory that the GPU cannot pin is refused, and calls come in by the other doors."""

import asyncio
from pathlib import Path

import grpc
import pytest
import torch

from expertd.kernels.torch.backend import TorchBackend
from expertd.proto.base.errors import ServerFault
from expertd.server.local.door import LocalDoor
from expertd.server.local.gpu import PIN_STEP, Gpu
from expertd.server.scheduling.node import Node
from tests.support.hanging import Hanging
from tests.support.local_caller import accepted, handing_over, sealed_memory
from tests.support.native.stand_in_gpu import StandInCuda
from tests.support.serving import door, execute_method, open_channel, random_batch, request_for, running_server, until


class Limited(StandInCuda):
    """Pins `most` pieces of memory."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self.pinned: dict[int, int] = {}

    def register(self, memory: memoryview) -> int:
        if len(self.pinned) == self._most:
            return 2
        self.pinned[address_of(memory)] = len(memory)
        return 0

    def unregister(self, memory: memoryview) -> None:
        del self.pinned[address_of(memory)]


async def test_what_cannot_be_pinned_is_refused_and_calls_go_over_grpc(small_model: Path) -> None:
    async with running_server(small_model, range(16), shared_memory_bytes=1 << 20) as server:
        door(server, LocalDoor).gpu.cuda = Limited(most=0)
        async with handing_over(server, [sealed_memory()]) as caller:
            error = (await caller.answer()).error
        assert (error.code, door(server, LocalDoor).mapped_bytes) == (grpc.StatusCode.INTERNAL.value[0], 0)
        assert error.message == "the segment's 65536 bytes cannot be pinned: CUDA error 2"
        async with open_channel(server) as channel:
            assert (await execute_method(channel)(request_for(server, random_batch(4, 256, 16, 4)))).partials


async def test_memory_is_pinned_in_steps_that_copies_are_cut_at_and_all_or_nothing() -> None:
    cuda = Limited(most=3)
    pinned = cuda.pinned
    node = Node({0: TorchBackend()}, most=1)
    node.start()
    gpu = Gpu(node, cuda)
    memory = memoryview(bytearray(5 * PIN_STEP))
    begin = address_of(memory)
    whole = memory[-begin % PIN_STEP + PIN_STEP - 4096 :][: PIN_STEP + 8192]
    release = await gpu.pin(whole)
    assert list(pinned.values()) == [4096, PIN_STEP, 4096]
    assert all(address % PIN_STEP == 0 for address in list(pinned)[1:])
    await gpu.release(release)
    assert not pinned
    with pytest.raises(ServerFault, match=f"the segment's {len(memory)} bytes cannot be pinned: CUDA error 2"):
        await gpu.pin(memory)
    assert not pinned
    node.stop()


class Awaited(TorchBackend):
    """Notes that somebody waits for it."""

    def __init__(self, name: str, events: list[str]) -> None:
        super().__init__()
        self._name = name
        self._events = events

    def synchronize(self) -> None:
        self._events.append(self._name)


class Noted(Limited):
    """Notes when memory is given back."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(most=1)
        self._events = events

    def unregister(self, memory: memoryview) -> None:
        self._events.append("unregistered")


async def test_every_sound_device_is_waited_for_before_memory_is_given_back() -> None:
    events: list[str] = []
    node = Node({number: Awaited(f"device {number}", events) for number in range(3)}, most=1)
    node.start()
    gpu = Gpu(node, Noted(events))
    release = await gpu.pin(memoryview(bytearray(4096)))
    node.lose(node.devices[0], "it is lost")
    await gpu.release(release)
    assert set(events[:-1]) == {"device 1", "device 2"}
    assert events[-1] == "unregistered"
    node.stop()


async def test_memory_that_a_hung_device_may_use_stays_and_others_go_on_meanwhile() -> None:
    events: list[str] = []
    stuck = Hanging()
    node = Node({0: TorchBackend(), 1: stuck}, most=1)
    node.start()
    gpu = Gpu(node, Noted(events))
    release = await gpu.pin(memoryview(bytearray(4096)))
    releasing = asyncio.create_task(gpu.release(release))
    await until(stuck.asked.is_set)
    assert await node.chores.call(lambda: "a chore") == "a chore"
    node.lose(node.devices[1], "it hangs")
    node.forsake(node.devices[1], hangs=True)
    assert not await releasing
    gpu.cuda = Noted(events)
    assert await gpu.release(await gpu.pin(memoryview(bytearray(4096))))
    assert events == ["unregistered"]
    stuck.go_on.set()
    node.stop()


async def test_a_segment_that_a_hung_device_may_use_stays_mapped(
    small_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_server(small_model, range(16), shared_memory_bytes=1 << 20) as server:
        local = door(server, LocalDoor)
        cuda = local.gpu.cuda = Limited(most=1)
        async with accepted(server):
            server.node.devices[0].hangs = True
        await until(lambda: "stays mapped: a device that hangs may use it" in caplog.text)
        assert list(cuda.pinned.values()) == [local.mapped_bytes]


def address_of(memory: memoryview) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
