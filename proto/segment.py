"""Where the tensors of a call lie in a segment of shared memory: one rule for both ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expertd.proto.errors import InvalidBatch

ALIGNMENT = 64
"""Every tensor begins at a multiple of it."""
QUANTIZATION_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte ranges of one call's tensors in a segment."""

    hidden: slice
    hidden_scales: slice
    expert_ids: slice
    weights: slice
    partials: slice

    @property
    def end(self) -> int:
        return int(self.partials.stop)


def lay_out(
    offset: int, tokens: int, width: int, top_k: int, hidden_dtype: torch.dtype, reply_dtype: torch.dtype
) -> Layout:
    """Place the tensors of a call one after another from `offset` on. Raises `InvalidBatch` for an odd offset."""
    if offset % ALIGNMENT:
        raise InvalidBatch(f"segment_offset is {offset}; it must be a multiple of {ALIGNMENT}")
    scales = tokens * (width // QUANTIZATION_BLOCK) * 4 if hidden_dtype == torch.float8_e4m3fn else 0
    slots = tokens * top_k * 4
    lengths = (tokens * width * hidden_dtype.itemsize, scales, slots, slots, tokens * width * reply_dtype.itemsize)
    places = []
    for length in lengths:
        places.append(slice(offset, offset + length))
        offset = -(-(offset + length) // ALIGNMENT) * ALIGNMENT
    return Layout(*places)
