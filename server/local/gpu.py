"""The GPU's side of memory that other processes share with this one. All of it happens on the device thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch

from expertd.kernels.memory.gpu import GpuMemory, GpuMemoryError, current_gpu
from expertd.proto.base.errors import InvalidBatch, ServerFault
from expertd.server.scheduling.device import DeviceOwner

Release: TypeAlias = Callable[[], object]
"""Gives memory back, after the last batch that uses it."""


class Gpu:
    """Lets the device use memory, and gives it back. A server that computes on the CPU has none present."""

    def __init__(self, device: DeviceOwner, *, present: bool) -> None:
        self._device = device
        self.present = present

    async def pin(self, memory: memoryview) -> Release | None:
        """Let a GPU copy from and to `memory` directly. Raises `ServerFault`."""
        if not self.present:
            return None
        await self._device.call(partial(pin, memory))
        return partial(unpin, memory)

    async def open(self, descriptor: int, size: int) -> GpuMemory:
        """Map a caller's memory of this GPU; its `close` gives it back. Raises `InvalidBatch`."""
        return await self._device.call(partial(open_gpu_memory, descriptor, size))

    async def release(self, release: Release | None) -> None:
        if release is not None:
            await self._device.call(release)


def pin(memory: memoryview) -> None:
    """Let the GPU copy from and to `memory` directly. Raises `ServerFault`."""
    code = torch.cuda.cudart().cudaHostRegister(_address(memory), len(memory), 0)
    if int(code) != 0:
        raise ServerFault(f"the segment's {len(memory)} bytes cannot be pinned: CUDA error {int(code)}")


def unpin(memory: memoryview) -> None:
    """Undo `pin` before the memory is unmapped."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(_address(memory))


def open_gpu_memory(descriptor: int, size: int) -> GpuMemory:
    """Map a caller's memory of this server's GPU. Raises `InvalidBatch`.

    To be closed on the device thread, too, after the last batch that uses it.
    """
    try:
        return GpuMemory.open(descriptor, size, current_gpu())
    except GpuMemoryError as error:
        raise InvalidBatch(f"the {size} bytes of GPU memory cannot be mapped: {error}") from None


def _address(memory: memoryview) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
