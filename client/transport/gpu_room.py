"""GPU memory shared with a server, and which parts of it calls have."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from expertd import _native
from expertd.kernels.memory.gpu import GpuMemory
from expertd.proto.lane.layout import GPU_ALIGNMENT, aligned

Returned: TypeAlias = tuple[int, int, torch.cuda.Event]


class GpuRoom:
    """Hands out ranges. One is free again when its last view is gone and the GPU has done what may still read it."""

    def __init__(self, memory: GpuMemory) -> None:
        self._memory = memory
        self._free = _native.FreeList(0, memory.size)
        self._returned: deque[Returned] = deque()
        """First byte, length, and when the work that may still read it ends; views may be dropped on any thread."""

    @property
    def size(self) -> int:
        return self._memory.size

    def take(self, length: int, stream: torch.cuda.Stream) -> tuple[int, Tensor] | None:
        """Where `length` bytes are, and they themselves, for work on `stream`; None when there is no room."""
        length = aligned(length, GPU_ALIGNMENT)
        self._reclaim(wait=False)
        offset = self._free.take(length)
        if offset is None:
            self._reclaim(wait=True)
            offset = self._free.take(length)
        if offset is None:
            return None
        released = partial(_release, self._returned, offset, length, stream)
        return offset, self._memory.tensor(offset, length, released)

    def _reclaim(self, *, wait: bool) -> None:
        for _ in range(len(self._returned)):
            start, length, unread = self._returned.popleft()
            if wait:
                unread.synchronize()
            if unread.query():
                self._free.give_back(start, length)
            else:
                self._returned.append((start, length, unread))


def _release(returned: deque[Returned], start: int, length: int, stream: torch.cuda.Stream) -> None:
    """The caller's last view is gone, but its stream may not have come to the work that reads it."""
    returned.append((start, length, stream.record_event()))
