"""A GPU's memory where there is no GPU: a memfd in the place of CUDA's allocations, with the same interface."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from typing import Self, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from expertd.kernels.memory.gpu import GpuMemoryError
from expertd.server.app import Server
from expertd.server.local.door import LocalDoor
from tests.support.serving import door

DEVICE = torch.device("cuda", 0)
UUID = "GPU-stand-in"
NAME = "stand-in-gpu"


class StandInMemory:
    """Like `GpuMemory`."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self._memory = mmap.mmap(descriptor, size)
        self.closed = False

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

    def close(self) -> None:
        self.closed = True


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


def as_stream(stream: StandInStream) -> torch.cuda.Stream:
    return cast(torch.cuda.Stream, stream)


def install(monkeypatch: pytest.MonkeyPatch, server: Server) -> StandInStream:
    """Let `server`, and clients in this process, take tensors in host memory for a GPU's; the stream of all calls."""
    stream = StandInStream()
    monkeypatch.setattr(door(server, LocalDoor).gpu, "present", True)
    monkeypatch.setattr(server.handlers._tickets, "_gpu", UUID)
    monkeypatch.setattr("expertd.server.local.gpu.current_gpu", lambda: DEVICE)
    monkeypatch.setattr("expertd.server.local.gpu.GpuMemory", StandInMemory)
    monkeypatch.setattr("expertd.server.local.gpu.pin", lambda memory: None)
    monkeypatch.setattr("expertd.server.local.gpu.unpin", lambda memory: None)
    monkeypatch.setattr("expertd.client.transport.segment_pool.GpuMemory", StandInMemory)
    monkeypatch.setattr("expertd.client.transport.segment_pool.gpu_uuid", lambda device: UUID)
    monkeypatch.setattr("expertd.client.transport.shared_memory.stream_of", lambda tensor: stream)
    return stream
