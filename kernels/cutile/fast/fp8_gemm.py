"""A product of FP8 rows, grouped by expert, with the experts' FP8 weights; block scales are applied in the K loop."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, hinted, take_turn
from expertd.kernels.cutile.fast.place_pairs import Schedule
from expertd.kernels.cutile.fast.tiles import GemmConfig
from expertd.kernels.model.config import BLOCK

ConstInt = Annotated[int, ct.ConstantAnnotation()]


def tile_position(tile: int, row_tiles: int, column_tiles: int, group: int) -> tuple[int, int]:
    """Row and column of a tile in the order in which blocks take them: `group` row tiles of a column, then the next."""
    first = tile // (group * column_tiles) * group
    grouped = min(row_tiles - first, group)
    within = tile % (group * column_tiles)
    return first + within % grouped, within // grouped


@ct.kernel
def fp8_gemm_kernel(
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
    UNROLL: ConstInt,
    GROUP: ConstInt,
    LATENCY: ConstInt,
    SCALES_IN_SHARED: ConstInt,
    BLOCK: ConstInt,
) -> None:
    take_turn()
    row_tiles = ct.load(num_tiles, (0,), (1,)).item()
    # No branch may enclose the loop over K: the compiler would have the loads of a tile wait for the tile before it.
    for tile in range(ct.bid(0), row_tiles * COLUMN_TILES, ct.num_blocks(0)):
        i, j = tile_position(tile, row_tiles, COLUMN_TILES, GROUP)
        expert = ct.gather(tile_experts, i, check_bounds=False)
        zeros = ct.zeros((TILE_ROWS, TILE_COLUMNS), dtype=ct.float32)
        acc = ct.zeros((TILE_ROWS, TILE_COLUMNS), dtype=ct.float32)
        for step in range(STEPS // UNROLL):
            for part in ct.static_iter(range(UNROLL)):
                k = step * UNROLL + part
                if SCALES_IN_SHARED:
                    scale = ct.load(row_scales, (k, i), (1, TILE_ROWS), latency=LATENCY, check_bounds=False)
                else:
                    scale = ct.load(row_scales, (k, i), (1, TILE_ROWS), allow_tma=False, latency=1, check_bounds=False)
                block_scale = ct.load(
                    weight_scales,
                    (expert, j * TILE_COLUMNS // BLOCK, k),
                    (1, 1, 1),
                    allow_tma=False,
                    latency=1,
                    check_bounds=False,
                ).item()
                a = ct.load(rows, (i, k), (TILE_ROWS, BLOCK), latency=LATENCY, check_bounds=False)
                b = ct.load(
                    weights,
                    (expert, k, j),
                    (1, BLOCK, TILE_COLUMNS),
                    order=(0, 2, 1),
                    latency=LATENCY,
                    check_bounds=False,
                ).reshape((BLOCK, TILE_COLUMNS))
                # The tensor cores add up one block; every block is then added in FP32.
                acc += ct.mma(a, b, zeros, use_fast_acc=True) * (scale.reshape((TILE_ROWS, 1)) * block_scale)
        ct.store(out, (i, j), acc.astype(out.dtype), check_bounds=False)


def fp8_gemm(
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
    """Write `rows @ weights[expert].T` of every row tile in use to `out`.

    `rows` [R, K] float8_e4m3fn with `row_scales` [K/128, R] float32; `weights` [E, N, K] float8_e4m3fn with
    `weight_scales` [E, N/128, K/128] float32; `out` [R, N] bfloat16 or float32. `blocks` is the size of the grid.
    """
    column_tiles, steps = out.shape[1] // config.tile_columns, rows.shape[1] // BLOCK
    unroll = config.unroll if steps % config.unroll == 0 else 1
    shape = (tile_rows, config.tile_columns, column_tiles, steps, unroll, config.group, config.latency)
    sizes = (*shape, int(config.scales_in_shared), BLOCK)
    arrays = (rows, row_scales, weights, weight_scales, schedule.tile_experts, schedule.num_tiles, out)
    return Launch(hinted(fp8_gemm_kernel, config.num_worker_warps, config.occupancy), (blocks,), (*arrays, *sizes))
