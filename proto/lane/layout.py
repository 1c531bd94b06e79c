"""Where the tensors of a call lie in shared memory: one rule for both ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from expertd.proto.base.errors import InvalidBatch

LANE_VERSION = 3
"""Of the contract's LANE, which `native/lane/ring.h` has."""
ALIGNMENT = 64
"""Every tensor in a segment begins at a multiple of it."""
GPU_ALIGNMENT = 256
"""Likewise in GPU memory."""
GPU_SIZE_BYTES = 8
"""Of the number after the ticket where GPU memory is handed over, too."""
QUANTIZATION_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte ranges of one call's tensors in a segment; with `on_gpu`, hidden, scales and partials are in GPU memory."""

    hidden: slice
    hidden_scales: slice
    expert_ids: slice
    weights: slice
    partials: slice
    on_gpu: bool

    @property
    def end(self) -> int:
        """Where the last tensor in the segment ends."""
        return int(self.weights.stop if self.on_gpu else self.partials.stop)

    @property
    def gpu_end(self) -> int:
        """Where the last tensor in GPU memory ends; 0 when there is none."""
        return int(self.partials.stop) if self.on_gpu else 0


@lru_cache(256)
def lay_out(
    offset: int,
    gpu_offset: int | None,
    tokens: int,
    width: int,
    top_k: int,
    hidden_dtype: torch.dtype,
    reply_dtype: torch.dtype,
) -> Layout:
    """Place the tensors of a call one after another from `offset` on, those of a GPU from `gpu_offset` on.

    Raises `InvalidBatch` for an odd offset.
    """
    if offset % ALIGNMENT:
        raise InvalidBatch(f"segment_offset is {offset}; it must be a multiple of {ALIGNMENT}")
    if gpu_offset is not None and gpu_offset % GPU_ALIGNMENT:
        raise InvalidBatch(f"gpu_offset is {gpu_offset}; it must be a multiple of {GPU_ALIGNMENT}")
    hidden, scales = tokens * width * hidden_dtype.itemsize, scales_bytes(hidden_dtype, tokens, width)
    choices, partials = tokens * top_k * 4, rows_bytes(reply_dtype, tokens, width)
    if gpu_offset is None:
        places = _one_after_another(offset, ALIGNMENT, hidden, scales, choices, choices, partials)
        first, second, ids, weights, last = places
    else:
        ids, weights = _one_after_another(offset, ALIGNMENT, choices, choices)
        first, second, last = _one_after_another(gpu_offset, GPU_ALIGNMENT, hidden, scales, partials)
    return Layout(first, second, ids, weights, last, on_gpu=gpu_offset is not None)


def scales_bytes(dtype: torch.dtype, tokens: int, width: int) -> int:
    """Of [T, H/128] float32, which values of FP8 alone have."""
    return tokens * (width // QUANTIZATION_BLOCK) * 4 if dtype == torch.float8_e4m3fn else 0


def rows_bytes(dtype: torch.dtype, tokens: int, width: int) -> int:
    """Of [T, H] values and their scales, which in replies follow right behind."""
    return tokens * width * dtype.itemsize + scales_bytes(dtype, tokens, width)


def tokens_within(most_bytes: int, width: int, *dtypes: torch.dtype) -> int:
    """How many tokens have at most so many bytes in each dtype; at least one."""
    return max(1, most_bytes // max(rows_bytes(dtype, 1, width) for dtype in dtypes))


def reply_room(experts: int) -> int:
    """Bytes that a slot leaves for the reply of a server, for a model of so many experts."""
    return aligned(1024 + 8 * experts)


def aligned(length: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of `alignment`."""
    return -(-length // alignment) * alignment


def _one_after_another(offset: int, alignment: int, *lengths: int) -> list[slice]:
    places = []
    for length in lengths:
        places.append(slice(offset, offset + length))
        offset = aligned(offset + length, alignment)
    return places
