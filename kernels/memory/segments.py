"""What torch would give back of the GPU memory that it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

EVERYBODYS = (0, 0)
"""The pool that is no CUDA graph's."""


def reusable(segments: Iterable[Mapping[str, Any]], device: int) -> int:
    """Bytes that tensors on any stream can have, of a device's segments as `torch.cuda.memory_snapshot` tells of them.

    Those of CUDA graphs stay theirs, and a segment that holds anything is for its own stream.
    """
    return sum(
        segment["total_size"]
        for segment in segments
        if segment["device"] == device
        and segment["active_size"] == 0
        and tuple(segment["segment_pool_id"]) == EVERYBODYS
    )
