"""The rows that the grouped products work on, built on the device from a batch's expert ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.kernels.token_sort import sort_pairs


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """One row for each of the P = T * k slots of a batch: the pairs sorted by expert and token, then unused rows."""

    tokens: Tensor
    """[P] int32: the token of each row; -1 for an unused row."""
    positions: Tensor
    """[T, k] int32: the row of each slot; -1 for a slot without an expert."""
    experts: Tensor
    """[S] int32: the experts that have rows, ascending, then -1."""
    counts: Tensor
    """[S] int32: the rows of each of `experts`; they follow one another."""
    pairs: Tensor
    """[E] int32: the rows of every local expert."""


def sort_rows(expert_ids: Tensor, num_experts: int, max_active: int) -> ExpertRows:
    """Sort [T, k] local expert ids (-1 for none), of which at most `max_active` differ, without waiting for the device.

    Rows of experts beyond `max_active` are left out of `pairs` too.
    """
    order = sort_pairs(expert_ids, num_experts)
    active = (order.counts == 0).argsort(stable=True)[:max_active]
    counts = order.counts[active]
    row = torch.arange(len(order.slots), device=expert_ids.device)
    used = row < counts.sum()
    positions = torch.empty_like(row).scatter_(0, order.slots, torch.where(used, row, -1))
    return ExpertRows(
        tokens=torch.where(used, order.tokens, -1).to(torch.int32),
        positions=positions.to(torch.int32).view_as(expert_ids),
        experts=torch.where(counts > 0, active, -1).to(torch.int32),
        counts=counts.to(torch.int32),
        pairs=torch.zeros_like(order.counts).scatter_(0, active, counts).to(torch.int32),
    )
