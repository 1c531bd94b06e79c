"""`fp8_gemm` for tiles of few rows, transposed: the weights are the left operand."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, hinted, take_turn
from expertd.kernels.cutile.fast.place_pairs import Schedule
from expertd.kernels.cutile.fast.tiles import GemmConfig
from expertd.kernels.model.config import BLOCK

ConstInt = Annotated[int, ct.ConstantAnnotation()]


@ct.kernel
def fp8_gemm_few_rows_kernel(
    rows: ct.Array,
    row_scales: ct.Array,
    weights: ct.Array,
    weight_scales: ct.Array,
    tile_experts: ct.Array,
    num_tiles: ct.Array,
    out: ct.Array,
    TILE_ROWS: ConstInt,
    TILE_COLUMNS: ConstInt,
    COLUMN_TILES: ConstInt,
    STEPS: ConstInt,
    STEP: ConstInt,
    LATENCY: ConstInt,
    BLOCK: ConstInt,
) -> None:
    take_turn()
    for tile in range(ct.bid(0), ct.load(num_tiles, (0,), (1,)).item() * COLUMN_TILES, ct.num_blocks(0)):
        i = tile // COLUMN_TILES
        j = tile % COLUMN_TILES
        expert = ct.load(tile_experts, (i,), (1,)).item()
        if expert >= 0:
            zeros = ct.zeros((TILE_COLUMNS, TILE_ROWS), dtype=ct.float32)
            acc = ct.zeros((TILE_COLUMNS, TILE_ROWS), dtype=ct.float32)
            for k in range(STEPS):
                scale = ct.load(row_scales, (k, i), (1, TILE_ROWS), allow_tma=False, latency=1, check_bounds=False)
                block_scale = ct.load(
                    weight_scales,
                    (expert, j * TILE_COLUMNS // BLOCK, k * STEP // BLOCK),
                    (1, 1, 1),
                    allow_tma=False,
                    latency=1,
                    check_bounds=False,
                ).item()
                x = ct.load(rows, (k, i), (STEP, TILE_ROWS), order=(1, 0), latency=LATENCY, check_bounds=False)
                w = ct.load(
                    weights, (expert, j, k), (1, TILE_COLUMNS, STEP), latency=LATENCY, check_bounds=False
                ).reshape((TILE_COLUMNS, STEP))
                acc += ct.mma(w, x, zeros, use_fast_acc=True) * (scale * block_scale)
            ct.store(out, (i, j), ct.transpose(acc.astype(out.dtype)), check_bounds=False)


def fp8_gemm_few_rows(
    rows: Tensor,
    row_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    schedule: Schedule,
    out: Tensor,
    tile_rows: int,
    config: GemmConfig,
    blocks: int,
) -> Launch:
    """`fp8_gemm` for tiles of 8 to 64 rows.

    The tensors are those of `fp8_gemm`, but `row_scales` is [I/q, R] float32, one scale for each 1 x q block of `rows`;
    q divides 128.
    """
    steps = row_scales.shape[0]
    column_tiles = out.shape[1] // config.tile_columns
    shape = (tile_rows, config.tile_columns, column_tiles, steps, rows.shape[1] // steps)
    sizes = (*shape, config.latency, BLOCK)
    arrays = (rows, row_scales, weights, weight_scales, schedule.tile_experts, schedule.num_tiles, out)
    kernel = hinted(fp8_gemm_few_rows_kernel, config.num_worker_warps, config.occupancy)
    return Launch(kernel, (blocks,), (*arrays, *sizes))
