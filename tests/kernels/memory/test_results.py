"""Results whose memory earlier ones left."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import pytest
import torch

from expertd import _native
from expertd.kernels.memory.results import LEAST_BYTES, empty

SHAPE = (LEAST_BYTES, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 128), SHAPE, (2, *SHAPE), (0, 128)])
def test_a_result_is_a_tensor_like_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    result = empty(shape, dtype)
    assert result.shape == shape
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert result.fill_(2.0).eq(2.0).all()


def test_memory_is_another_results_only_when_nobody_has_it_any_more() -> None:
    first = empty(SHAPE, torch.float32)
    row, where = first[7].fill_(3.0), first.data_ptr()
    second = empty(SHAPE, torch.float32)
    assert second.data_ptr() != where
    del first
    gc.collect()
    # A view holds it, as it does with any tensor.
    third = empty(SHAPE, torch.float32).fill_(0.0)
    assert third.data_ptr() != where
    assert row.eq(3.0).all()
    del row
    gc.collect()
    assert empty(SHAPE, torch.float32).data_ptr() == where


def test_no_more_is_kept_than_half_a_gibibyte() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def touched() -> _native.Room:
        room = _native.Room(64 << 20)
        memoryview(room)[:] = bytes(len(room))
        return room

    rooms = [touched() for _ in range(12)]
    gc.collect()
    with_all = resident()
    rooms.clear()
    gc.collect()
    assert 248 << 20 <= with_all - resident() <= 320 << 20
