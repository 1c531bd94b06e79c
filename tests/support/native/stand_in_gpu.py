"""A GPU's memory where there is no GPU: a memfd in the place of CUDA's allocations, with the same interface."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable
from typing import ClassVar, Self, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from expertd.kernels.memory.gpu import GpuMemory, GpuMemoryError
from expertd.server.app import Server
from expertd.server.local.door import LocalDoor
from expertd.server.local.gpu import Cuda
from tests.support.serving import door

DEVICE = torch.device("cuda", 0)
UUID = "GPU-stand-in"
NAME = "stand-in-gpu"


class StandInMemory:
    """Like `GpuMemory`, unmapped when nobody has it any more."""

    unmapped_by: ClassVar[list[str]] = []
    """Threads, of each memory that is gone."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(descriptor, size)
        self.address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self.close = weakref.finalize(self, self._note)
        self.close.atexit = False

    @classmethod
    def create(cls, size: int, device: torch.device) -> tuple[Self, int]:
        assert device == DEVICE
        descriptor = os.memfd_create(NAME)
        os.ftruncate(descriptor, size)
        return cls(descriptor, size), descriptor

    @classmethod
    def open(cls, descriptor: int, size: int, device: torch.device) -> Self:
        assert device == DEVICE
        if os.fstat(descriptor).st_size < size:
            raise GpuMemoryError("cuMemMap: CUDA_ERROR_INVALID_VALUE")
        return cls(descriptor, size)

    def tensor(self, offset: int, length: int, released: Callable[[], object] | None = None) -> Tensor:
        part = np.frombuffer(self._memory, np.uint8, length, offset)
        if released is not None:
            weakref.finalize(part, released).atexit = False
        return torch.from_numpy(part)

    @classmethod
    def _note(cls) -> None:
        cls.unmapped_by.append(threading.current_thread().name)


class StandInEvent:
    """Like `torch.cuda.Event`; has happened unless its stream is busy."""

    def __init__(self, stream: StandInStream) -> None:
        self._stream = stream

    def query(self) -> bool:
        return not self._stream.busy

    def synchronize(self) -> None:
        self._stream.busy = False


class StandInStream:
    """Like `torch.cuda.Stream`."""

    device = DEVICE

    def __init__(self) -> None:
        self.busy = False

    def record_event(self) -> StandInEvent:
        return StandInEvent(self)


class StandInCuda(Cuda):
    """Pins nothing."""

    def __init__(self) -> None:
        super().__init__(DEVICE)

    def register(self, memory: memoryview) -> int:
        return 0

    def unregister(self, memory: memoryview) -> None: ...

    def open(self, descriptor: int, size: int) -> GpuMemory:
        return cast(GpuMemory, StandInMemory.open(descriptor, size, self.device))


def as_stream(stream: StandInStream) -> torch.cuda.Stream:
    return cast(torch.cuda.Stream, stream)


def install(
    monkeypatch: pytest.MonkeyPatch,
    server: Server,
    memory: type[StandInMemory] = StandInMemory,
    cuda: Callable[[], StandInCuda] = StandInCuda,
) -> StandInStream:
    """Let `server`, and clients in this process, take tensors in host memory for a GPU's; the stream of all calls.

    `memory` is the clients', `cuda` the server's.
    """
    stream = StandInStream()
    door(server, LocalDoor).gpu.cuda = cuda()
    server.handlers.tickets.gpu = UUID
    monkeypatch.setattr("expertd.client.transport.segment_pool.GpuMemory", memory)
    uuid_of = {"cuda": UUID, "cpu": ""}
    monkeypatch.setattr("expertd.client.transport.segment_pool.gpu_uuid", lambda device: uuid_of[device.type])
    monkeypatch.setattr("expertd.client.transport.shared_memory.stream_of", lambda tensor: stream)
    return stream
