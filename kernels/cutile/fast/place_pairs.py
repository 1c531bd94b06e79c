"""Where every (token, expert) pair goes when pairs are sorted by expert, without a sort or a host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, take_turn
from expertd.kernels.cutile.base.shape import shape_class
from expertd.kernels.cutile.fast.count_pairs import TOKENS

ConstInt = Annotated[int, ct.ConstantAnnotation()]
MAP_TILES = 128
"""Row tiles whose expert one block writes at a time."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The sorted order of a batch: rows grouped by expert, each expert's padded to whole row tiles, then by token."""

    pair_rows: Tensor
    """[T, k] int32: the sorted row of each pair, -1 where there is none."""
    pairs: Tensor
    """[E] int32: pairs of each expert."""
    tile_experts: Tensor
    """[row tiles] int32: the expert of each row tile, -1 past the last one in use."""
    num_tiles: Tensor
    """[1] int32: row tiles in use."""
    counts: Tensor
    """[blocks of tokens, experts rounded up to a power of two] int32: scratch between the two kernels."""


@ct.kernel
def place_pairs_kernel(
    expert_ids: ct.Array,
    counts: ct.Array,
    pair_rows: ct.Array,
    pairs: ct.Array,
    tile_experts: ct.Array,
    num_tiles: ct.Array,
    TOP_K: ConstInt,
    EXPERTS: ConstInt,
    LOCAL: ConstInt,
    TOKENS: ConstInt,
    BLOCKS: ConstInt,
    TILE_ROWS: ConstInt,
    MAP_TILES: ConstInt,
) -> None:
    take_turn()
    block = ct.bid(0)
    blocks = ct.num_blocks(0)
    token = block * TOKENS + ct.arange(TOKENS, dtype=ct.int32).reshape((TOKENS, 1))
    expert = ct.arange(EXPERTS, dtype=ct.int32).reshape((1, EXPERTS))
    members = ct.zeros((TOKENS, EXPERTS), dtype=ct.int32)
    for choice in range(TOP_K):
        chosen = ct.gather(expert_ids, (token, choice), padding_value=-1)
        members = members + ((chosen == expert) & (expert < LOCAL)).astype(ct.int32)
    if BLOCKS == 1:
        total = ct.sum(members, axis=0, keepdims=True)
        before = ct.zeros((1, EXPERTS), dtype=ct.int32)
    else:
        index = ct.arange(BLOCKS, dtype=ct.int32).reshape((BLOCKS, 1))
        counted = ct.gather(counts, (index, expert), mask=(index < blocks) & (expert < LOCAL), padding_value=0)
        total = ct.sum(counted, axis=0, keepdims=True)
        before = ct.sum(ct.where(index < block, counted, 0), axis=0, keepdims=True)
    tiles = (total + (TILE_ROWS - 1)) // TILE_ROWS
    tile_ends = ct.cumsum(tiles, axis=1)
    # How many earlier tokens of this block chose the expert, as a product with a triangle of ones: exact, and a scan
    # along this axis spills.
    earlier = (ct.arange(TOKENS, dtype=ct.int32).reshape((1, TOKENS)) < token - block * TOKENS).astype(ct.float16)
    rank = ct.mma(earlier, members.astype(ct.float16), ct.zeros((TOKENS, EXPERTS), dtype=ct.float32))
    row = (tile_ends - tiles) * TILE_ROWS + before + rank.astype(ct.int32)
    for choice in range(TOP_K):
        chosen = ct.gather(expert_ids, (token, choice), padding_value=-1)
        here = (chosen == expert) & (expert < LOCAL)
        placed = ct.sum(ct.where(here, row + 1, 0), axis=1, keepdims=True) - 1
        ct.scatter(pair_rows, (token, choice), placed)
    if block == 0:
        ct.scatter(pairs, expert.reshape((EXPERTS,)), total.reshape((EXPERTS,)))
        ct.store(num_tiles, (0,), ct.sum(tiles, axis=1))
    for part in range(block, ct.cdiv(tile_experts.shape[0], MAP_TILES), blocks):
        tile = part * MAP_TILES + ct.arange(MAP_TILES, dtype=ct.int32).reshape((MAP_TILES, 1))
        owner = ct.sum((tile_ends <= tile).astype(ct.int32), axis=1)
        ct.store(tile_experts, (part,), ct.where(owner < EXPERTS, owner, -1))


def place_pairs(expert_ids: Tensor, schedule: Schedule, tile_rows: int) -> Launch:
    """Fill `schedule` for `expert_ids` [T, k] int32; `schedule.counts` must hold the counts if T > `TOKENS`.

    An id that is no local expert's is taken as none.
    """
    tokens, top_k = expert_ids.shape
    block_tokens = min(TOKENS, max(16, 1 << (tokens - 1).bit_length()))
    blocks = ct.cdiv(tokens, block_tokens)
    # Compiled once a shape class, not once a number of blocks.
    padded_blocks = 1 << (ct.cdiv(max(tokens, shape_class(tokens)), TOKENS) - 1).bit_length() if blocks > 1 else 1
    experts = schedule.counts.shape[1]
    sizes = (top_k, experts, len(schedule.pairs), block_tokens, padded_blocks, tile_rows, MAP_TILES)
    arrays = (schedule.counts, schedule.pair_rows, schedule.pairs, schedule.tile_experts, schedule.num_tiles)
    return Launch(place_pairs_kernel, (blocks,), (expert_ids, *arrays, *sizes))
