"""The second product of the experts, down."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.config import BLOCK
from expertd.kernels.cutile.gemm1 import PAIR
from expertd.kernels.cutile.launch import Launch, hinted
from expertd.kernels.cutile.place_pairs import Schedule
from expertd.kernels.cutile.tiles import GemmConfig

ConstInt = Annotated[int, ct.ConstantAnnotation()]


@ct.kernel(num_ctas=PAIR)
def gemm2_kernel(
    rows: ct.Array,
    row_scales: ct.Array,
    weights: ct.Array,
    weight_scales: ct.Array,
    tile_experts: ct.Array,
    num_tiles: ct.Array,
    out: ct.Array,
    TILE_ROWS: ConstInt,
    COLUMN_BLOCKS: ConstInt,
    STEPS: ConstInt,
    GROUP: ConstInt,
    LATENCY: ConstInt,
    BLOCK: ConstInt,
) -> None:
    row_tiles = ct.load(num_tiles, (0,), (1,)).item()
    column_tiles = (COLUMN_BLOCKS + 1) // 2
    half = ct.arange(2, dtype=ct.int32)
    for tile in range(ct.bid(0), row_tiles * column_tiles, ct.num_blocks(0)):
        first = tile // (GROUP * column_tiles) * GROUP
        grouped = min(row_tiles - first, GROUP)
        within = tile % (GROUP * column_tiles)
        i = first + within % grouped
        j = within // grouped
        expert = ct.load(tile_experts, (i,), (1,)).item()
        if expert >= 0:
            zeros = ct.zeros((TILE_ROWS, 2 * BLOCK), dtype=ct.float32)
            acc = ct.zeros((TILE_ROWS, 2, BLOCK), dtype=ct.float32)
            column_block = 2 * j + half
            if COLUMN_BLOCKS % 2 == 1:
                column_block = ct.minimum(column_block, COLUMN_BLOCKS - 1)
            for k in range(STEPS):
                scale = ct.load(row_scales, (i, k), (TILE_ROWS, 1), allow_tma=False, latency=1, check_bounds=False)
                half_scales = ct.gather(weight_scales, (expert, column_block, k), check_bounds=False, latency=1)
                a = ct.load(rows, (i, k), (TILE_ROWS, BLOCK), latency=LATENCY, check_bounds=False)
                b = ct.load(weights, (expert, k, j), (1, BLOCK, 2 * BLOCK), order=(0, 2, 1), latency=LATENCY)
                product = ct.mma(a, b.reshape((BLOCK, 2 * BLOCK)), zeros, use_fast_acc=True)
                product = product.reshape((TILE_ROWS, 2, BLOCK))
                acc += product * (scale.reshape((TILE_ROWS, 1, 1)) * half_scales.reshape((1, 2, 1)))
            ct.store(out, (i, j), acc.reshape((TILE_ROWS, 2 * BLOCK)).astype(out.dtype))


def gemm2(
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

    `rows` [R, I] float8_e4m3fn with `row_scales` [R, I/128] float32; `weights` [E, H, I] float8_e4m3fn with
    `weight_scales` [E, H/128, I/128] float32; `out` [R, H] bfloat16 or float32. `blocks` is the size of the grid.
    """
    column_blocks, steps = out.shape[1] // BLOCK, rows.shape[1] // BLOCK
    sizes = (tile_rows, column_blocks, steps, config.group, config.latency, BLOCK)
    arrays = (rows, row_scales, weights, weight_scales, schedule.tile_experts, schedule.num_tiles, out)
    return Launch(hinted(gemm2_kernel, config.num_worker_warps, config.occupancy), (blocks,), (*arrays, *sizes))
