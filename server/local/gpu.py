"""The GPU's side of memory that other processes share with this one. All of it happens on the device thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from expertd.kernels.memory.gpu import GpuMemory, GpuMemoryError
from expertd.proto.base.errors import InvalidBatch, NotPermitted, ServerFault
from expertd.server.scheduling.node import Device, Node

PORTABLE = 1
"""cudaHostRegisterPortable: for all devices of this process."""
PIN_STEP = 2 << 20
"""The native executor cuts its copies where registrations end: at multiples of it."""


@dataclass(slots=True)
class Cuda:
    """What is asked of CUDA. Errors are its own: 0 is none."""

    device: torch.device

    def register(self, memory: memoryview) -> int:
        """Let the GPU copy from and to `memory` directly."""
        return int(torch.cuda.cudart().cudaHostRegister(_address(memory), len(memory), PORTABLE))

    def unregister(self, memory: memoryview) -> None:
        """Undo `register` before the memory is unmapped."""
        torch.cuda.cudart().cudaHostUnregister(_address(memory))

    def open(self, descriptor: int, size: int) -> GpuMemory:
        """Map a caller's memory. To be closed on the device thread, too, after the last batch that uses it."""
        return GpuMemory.open(descriptor, size, self.device)


@dataclass(frozen=True, slots=True)
class Release:
    """Gives memory back after the last batch that uses it."""

    steps: Sequence[Callable[[], object]]
    users: Sequence[Device] = ()
    """That may copy from and to it for themselves."""


class Gpu:
    """Lets the device use memory, and gives it back. A server that computes on the CPU has no `cuda`."""

    def __init__(self, node: Node, cuda: Cuda | None) -> None:
        self._node = node
        self.cuda = cuda

    def require(self) -> Cuda:
        """For memory of the GPU. Raises `NotPermitted` where there is none, or more than one."""
        if self.cuda is None:
            raise NotPermitted("this server computes on no GPU; hand over the segment alone")
        if len(self._node.devices) > 1:
            raise NotPermitted("this server computes on several GPUs; hand over the segment alone")
        return self.cuda

    async def pin(self, memory: memoryview) -> Release | None:
        """Let a GPU copy from and to `memory` directly. Raises `ServerFault`."""
        if (cuda := self.cuda) is None:
            return None
        steps: list[Callable[[], object]] = []
        # In steps: while CUDA pins a GiB, nothing is launched.
        for piece in pieces_of(memory):
            code = await self._node.chores.call(partial(cuda.register, piece))
            if code != 0:
                await self.release(Release(steps))
                raise ServerFault(f"the segment's {len(memory)} bytes cannot be pinned: CUDA error {code}")
            steps.append(partial(cuda.unregister, piece))
        return Release(steps, self._node.sound)

    async def open(self, descriptor: int, size: int) -> GpuMemory:
        """Map a caller's memory of this GPU; its `close` gives it back. Raises `InvalidBatch`."""
        try:
            return await self._node.chores.call(partial(self.require().open, descriptor, size))
        except GpuMemoryError as error:
            raise InvalidBatch(f"the {size} bytes of GPU memory cannot be mapped: {error}") from None

    async def release(self, release: Release | None) -> bool:
        """Whether memory is given back: what a device that hangs may yet use has to stay as it is."""
        if release is None:
            return True
        if release.users:
            await self._node.each(lambda backend: backend.synchronize())
        if any(device.hangs for device in release.users):
            return False
        for step in release.steps:
            await self._node.chores.call(step)
        return True


def pieces_of(memory: memoryview) -> Iterator[memoryview]:
    """`memory`, cut at the addresses that are multiples of `PIN_STEP`."""
    address = _address(memory)
    cuts = [0, *range(-address % PIN_STEP or PIN_STEP, len(memory), PIN_STEP), len(memory)]
    return (memory[begin:end] for begin, end in pairwise(cuts))


def _address(memory: memoryview) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
