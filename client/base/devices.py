"""Which device a caller means, and having it for the current one."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def as_device(device: torch.device | str | None) -> torch.device:
    """Without a number, or without any, this thread's current GPU, if there is one."""
    chosen = torch.device(device or "cuda")
    if chosen.type == "cuda" and chosen.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Have it be this thread's current GPU in a block; do nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
