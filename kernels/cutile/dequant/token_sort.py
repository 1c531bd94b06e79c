"""The rows that the grouped products work on, built on the device from a batch's expert ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.kernels.cutile.base.shape import max_row_tiles
from expertd.kernels.numerics.token_sort import sort_pairs


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """The pairs of a batch in R rows, sorted by expert and token; each expert's rows start a new tile of rows."""

    tokens: Tensor
    """[R] int32: the token of each row; -1 for a row that pads a tile or is unused."""
    positions: Tensor
    """[T, k] int32: the row of each choice; -1 for one without an expert."""
    experts: Tensor
    """[S] int32: the experts that have rows, ascending, then -1."""
    tile_slots: Tensor
    """[row tiles] int32: the index into `experts` of each tile, for the first `num_tiles`."""
    num_tiles: Tensor
    """[1] int32: row tiles that hold pairs."""
    pairs: Tensor
    """[E] int32: the pairs of every local expert."""


def sort_rows(expert_ids: Tensor, num_experts: int, max_active: int, tile_rows: int) -> ExpertRows:
    """Sort [T, k] local expert ids (-1 for none), of which at most `max_active` differ, without waiting for the device.

    Pairs of experts beyond `max_active` get no rows and are left out of `pairs` too.
    """
    order = sort_pairs(expert_ids, num_experts)
    active = (order.counts == 0).argsort(stable=True)[:max_active]
    counts = order.counts[active]
    ends = counts.cumsum(0)
    tile_counts = (counts + tile_rows - 1) // tile_rows
    tile_ends = tile_counts.cumsum(0)
    num_tokens, top_k = expert_ids.shape
    tiles = max_row_tiles(num_tokens, top_k, max_active, tile_rows)

    pair = torch.arange(len(order.choices), device=expert_ids.device)
    slot = torch.searchsorted(ends, pair, right=True)
    used = slot < len(ends)
    slot = slot.clamp(max=len(ends) - 1)
    rows = (tile_ends - tile_counts)[slot] * tile_rows + pair - (ends - counts)[slot]
    # One row more than there are takes what is not a pair.
    tokens = order.tokens.new_full((tiles * tile_rows + 1,), -1)
    tokens.scatter_(0, torch.where(used, rows, tiles * tile_rows), torch.where(used, order.tokens, -1))
    positions = torch.empty_like(rows).scatter_(0, order.choices, torch.where(used, rows, -1))
    tile = torch.arange(tiles, device=expert_ids.device)
    return ExpertRows(
        tokens=tokens[:-1].to(torch.int32),
        positions=positions.to(torch.int32).view_as(expert_ids),
        experts=torch.where(counts > 0, active, -1).to(torch.int32),
        tile_slots=torch.searchsorted(tile_ends, tile, right=True).to(torch.int32),
        num_tiles=tile_ends[-1:].to(torch.int32),
        pairs=torch.zeros_like(order.counts).scatter_(0, active, counts).to(torch.int32),
    )
