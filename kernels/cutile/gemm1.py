"""The first product of the experts, up and gate, with SwiGLU and FP8 re-quantisation in its epilogue."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.config import BLOCK
from expertd.kernels.cutile.launch import Launch, hinted
from expertd.kernels.cutile.place_pairs import Schedule
from expertd.kernels.cutile.tiles import GemmConfig
from expertd.kernels.quantize import FP8_MAX, LEAST_AMAX

ConstInt = Annotated[int, ct.ConstantAnnotation()]
ConstFloat = Annotated[float, ct.ConstantAnnotation()]
MINUS_LOG2_E = -1.4426950408889634
PAIR = ct.ByTarget(sm_90=2, sm_100=2, sm_103=2, default=1)
"""Thread blocks that share a tile where they can form clusters: both take the rows by one multicast load."""


@ct.kernel(num_ctas=PAIR)
def gemm1_kernel(
    rows: ct.Array,
    row_scales: ct.Array,
    weights: ct.Array,
    weight_scales: ct.Array,
    tile_experts: ct.Array,
    num_tiles: ct.Array,
    out: ct.Array,
    out_scales: ct.Array,
    TILE_ROWS: ConstInt,
    COLUMN_TILES: ConstInt,
    STEPS: ConstInt,
    GROUP: ConstInt,
    LATENCY: ConstInt,
    BLOCK: ConstInt,
    MINUS_LOG2_E: ConstFloat,
    FP8_MAX: ConstFloat,
    LEAST_AMAX: ConstFloat,
) -> None:
    row_tiles = ct.load(num_tiles, (0,), (1,)).item()
    half = ct.arange(2, dtype=ct.int32)
    for tile in range(ct.bid(0), row_tiles * COLUMN_TILES, ct.num_blocks(0)):
        first = tile // (GROUP * COLUMN_TILES) * GROUP
        grouped = min(row_tiles - first, GROUP)
        within = tile % (GROUP * COLUMN_TILES)
        i = first + within % grouped
        j = within // grouped
        expert = ct.load(tile_experts, (i,), (1,)).item()
        if expert >= 0:
            zeros = ct.zeros((TILE_ROWS, 2 * BLOCK), dtype=ct.float32)
            # One product over both halves, each with its own scale: two products with an accumulator each leave the
            # compiler too few registers to pipeline the loads.
            acc = ct.zeros((TILE_ROWS, 2, BLOCK), dtype=ct.float32)
            for k in range(STEPS):
                scale = ct.load(row_scales, (i, k), (TILE_ROWS, 1), allow_tma=False, latency=1, check_bounds=False)
                half_scales = ct.gather(weight_scales, (expert, 2 * j + half, k), check_bounds=False, latency=1)
                a = ct.load(rows, (i, k), (TILE_ROWS, BLOCK), latency=LATENCY, check_bounds=False)
                b = ct.load(
                    weights, (expert, k, j), (1, BLOCK, 2 * BLOCK), order=(0, 2, 1), latency=LATENCY, check_bounds=False
                ).reshape((BLOCK, 2 * BLOCK))
                product = ct.mma(a, b, zeros, use_fast_acc=True).reshape((TILE_ROWS, 2, BLOCK))
                acc += product * (scale.reshape((TILE_ROWS, 1, 1)) * half_scales.reshape((1, 2, 1)))
            up = ct.extract(acc, (0, 0, 0), (TILE_ROWS, 1, BLOCK)).reshape((TILE_ROWS, BLOCK))
            gate = ct.extract(acc, (0, 1, 0), (TILE_ROWS, 1, BLOCK)).reshape((TILE_ROWS, BLOCK))
            gate = ct.truediv(
                gate,
                1.0 + ct.exp2(gate * MINUS_LOG2_E),
                rounding_mode=ct.RoundingMode.APPROX,
                flush_to_zero=True,
            )
            inner = gate * up
            out_scale = ct.maximum(ct.max(ct.abs(inner), axis=1, keepdims=True), LEAST_AMAX) * (1.0 / FP8_MAX)
            ct.store(out, (i, j), (inner * (1.0 / out_scale)).astype(out.dtype), check_bounds=False)
            ct.store(out_scales, (i, j), out_scale, check_bounds=False)


def gemm1(
    rows: Tensor,
    row_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    schedule: Schedule,
    out: Tensor,
    out_scales: Tensor,
    tile_rows: int,
    config: GemmConfig,
    blocks: int,
) -> Launch:
    """Write silu(gate) * up of every row tile in use to `out`, quantised in 1x128 blocks.

    `rows` [R, H] float8_e4m3fn with `row_scales` [R, H/128] float32; `weights` [E, 2I, H] float8_e4m3fn, 128 rows of up
    and 128 of gate in turn, with `weight_scales` [E, 2I/128, H/128] float32; `out` [R, I] float8_e4m3fn with `out_scales` [R, I/128] float32.
    `blocks` is the size of the grid.
    """
    column_tiles, steps = out.shape[1] // BLOCK, rows.shape[1] // BLOCK
    sizes = (tile_rows, column_tiles, steps, config.group, config.latency, BLOCK, MINUS_LOG2_E, FP8_MAX, LEAST_AMAX)
    arrays = (rows, row_scales, weights, weight_scales, schedule.tile_experts, schedule.num_tiles, out, out_scales)
    return Launch(hinted(gemm1_kernel, config.num_worker_warps, config.occupancy), (blocks,), (*arrays, *sizes))
