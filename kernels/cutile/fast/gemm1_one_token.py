"""One token: the first product of its experts, from the token itself and its ids, K in parts."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, hinted, take_turn
from expertd.kernels.cutile.fast.tiles import GemmConfig
from expertd.kernels.model.config import BLOCK

ConstInt = Annotated[int, ct.ConstantAnnotation()]
ROWS = 8
"""Rows of a tile, the fewest that the tensor cores take: the token, and nothing."""


@ct.kernel
def gemm1_one_token_kernel(
    hidden: ct.Array,
    scales: ct.Array,
    expert_ids: ct.Array,
    weights: ct.Array,
    weight_scales: ct.Array,
    out: ct.Array,
    TOP_K: ConstInt,
    EXPERTS: ConstInt,
    TILE_COLUMNS: ConstInt,
    STEPS: ConstInt,
    SPLITS: ConstInt,
    LATENCY: ConstInt,
    ROWS: ConstInt,
    BLOCK: ConstInt,
) -> None:
    take_turn()
    split = ct.bid(0) % SPLITS
    j = ct.bid(0) // SPLITS
    for choice in range(TOP_K):
        expert = ct.load(expert_ids, (0, choice), (1, 1), allow_tma=False).item()
        if (expert >= 0) & (expert < EXPERTS):
            zeros = ct.zeros((TILE_COLUMNS, ROWS), dtype=ct.float32)
            acc = ct.zeros((TILE_COLUMNS, ROWS), dtype=ct.float32)
            for step in range(STEPS // SPLITS):
                k = split * (STEPS // SPLITS) + step
                scale = ct.load(scales, (0, k), (1, 1), allow_tma=False, latency=1, check_bounds=False).item()
                block_scale = ct.load(
                    weight_scales,
                    (expert, j * TILE_COLUMNS // BLOCK, k),
                    (1, 1, 1),
                    allow_tma=False,
                    latency=1,
                    check_bounds=False,
                ).item()
                x = ct.load(
                    hidden,
                    (k, 0),
                    (BLOCK, ROWS),
                    order=(1, 0),
                    padding_mode=ct.PaddingMode.ZERO,
                    latency=LATENCY,
                )
                w = ct.load(
                    weights, (expert, j, k), (1, TILE_COLUMNS, BLOCK), latency=LATENCY, check_bounds=False
                ).reshape((TILE_COLUMNS, BLOCK))
                acc += ct.mma(w, x, zeros, use_fast_acc=True) * (scale * block_scale)
            token = ct.extract(acc, (0, 0), (TILE_COLUMNS, 1)).reshape((1, 1, TILE_COLUMNS))
            ct.store(out, (split, choice, j), token, allow_tma=False, check_bounds=False)


def gemm1_one_token(
    hidden: Tensor,
    scales: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    out: Tensor,
    config: GemmConfig,
) -> Launch:
    """Write `hidden @ weights[expert_ids[0, j]].T` of a token's local experts to `out[:, j]`, in parts to be added up.

    `hidden` [1, H] float8_e4m3fn with `scales` [1, H/128] float32; `expert_ids` [1, k] int32; `weights` [E, 2I, H]
    float8_e4m3fn with `weight_scales` [E, 2I/128, H/128] float32; `out` [splits, k, 2I] float32.
    """
    steps, top_k = hidden.shape[1] // BLOCK, expert_ids.shape[1]
    grid = (out.shape[2] // config.tile_columns * len(out),)
    sizes = (top_k, len(weights), config.tile_columns, steps, len(out), config.latency, ROWS, BLOCK)
    arrays = (hidden, scales, expert_ids, weights, weight_scales, out)
    return Launch(hinted(gemm1_one_token_kernel, config.num_worker_warps, config.occupancy), grid, (*arrays, *sizes))
