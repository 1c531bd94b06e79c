"""Sorting (token, expert) pairs by expert without a Python loop or a device-to-host copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PairOrder:
    """The P = T * k choices of a batch, sorted by local expert; choices without an expert come last."""

    tokens: Tensor
    """[P] int64: the token of each sorted choice."""
    choices: Tensor
    """[P] int64: the flat index into the [T, k] ids of each sorted choice."""
    counts: Tensor
    """[E] int64: pairs of each expert; the first `counts.sum()` sorted choices are the pairs."""


def sort_pairs(expert_ids: Tensor, num_experts: int) -> PairOrder:
    """Sort [T, k] local expert ids (-1 for none) by expert, then by token. Works on any device."""
    flat = expert_ids.reshape(-1)
    keys = torch.where(flat < 0, num_experts, flat)
    ordered, choices = keys.sort(stable=True)
    # The counts that `bincount` gives; on CUDA that one waits for the device to learn how long its result is.
    ends = torch.searchsorted(ordered, torch.arange(num_experts + 1, dtype=ordered.dtype, device=ordered.device))
    return PairOrder(tokens=choices // expert_ids.shape[1], choices=choices, counts=ends.diff())
