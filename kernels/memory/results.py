"""Tensors for results, in memory that earlier ones left."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from expertd import _native

LEAST_BYTES = 128 << 10
"""From here on C libraries may give freed memory back to the kernel, which hands it out again page by page, cleared."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU; what is large is where an earlier result was that nobody has any more."""
    count = prod(shape)
    size = count * dtype.itemsize
    if size < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(_native.Room(size), dtype=dtype, count=count).reshape(shape)
