"""The first product of the experts for tiles of few rows, transposed: the weights are the left operand."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, hinted, take_turn
from expertd.kernels.cutile.base.limit import limit_constant
from expertd.kernels.cutile.fast.place_pairs import Schedule
from expertd.kernels.cutile.fast.swiglu_quantize import MINUS_LOG2_E, scale_of, swiglu
from expertd.kernels.cutile.fast.tiles import GemmConfig
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.quantize import FP8_MAX, LEAST_AMAX

ConstInt = Annotated[int, ct.ConstantAnnotation()]
ConstFloat = Annotated[float, ct.ConstantAnnotation()]


@ct.kernel
def gemm1_few_rows_kernel(
    rows: ct.Array,
    row_scales: ct.Array,
    weights: ct.Array,
    weight_scales: ct.Array,
    tile_experts: ct.Array,
    num_tiles: ct.Array,
    out: ct.Array,
    out_scales: ct.Array,
    TILE_ROWS: ConstInt,
    TILE_COLUMNS: ConstInt,
    COLUMN_TILES: ConstInt,
    STEPS: ConstInt,
    LATENCY: ConstInt,
    BLOCK: ConstInt,
    MINUS_LOG2_E: ConstFloat,
    FP8_MAX: ConstFloat,
    LEAST_AMAX: ConstFloat,
    LIMIT: ConstFloat,
) -> None:
    take_turn()
    for tile in range(ct.bid(0), ct.load(num_tiles, (0,), (1,)).item() * COLUMN_TILES, ct.num_blocks(0)):
        i = tile // COLUMN_TILES
        j = tile % COLUMN_TILES
        expert = ct.load(tile_experts, (i,), (1,)).item()
        if expert >= 0:
            zeros = ct.zeros((TILE_COLUMNS, TILE_ROWS), dtype=ct.float32)
            gate = ct.zeros((TILE_COLUMNS, TILE_ROWS), dtype=ct.float32)
            up = ct.zeros((TILE_COLUMNS, TILE_ROWS), dtype=ct.float32)
            up_block = j * TILE_COLUMNS // BLOCK
            gate_block = (j + COLUMN_TILES) * TILE_COLUMNS // BLOCK
            for k in range(STEPS):
                scale = ct.load(row_scales, (k, i), (1, TILE_ROWS), allow_tma=False, latency=1, check_bounds=False)
                gate_scale = ct.load(
                    weight_scales, (expert, gate_block, k), (1, 1, 1), allow_tma=False, latency=1, check_bounds=False
                ).item()
                up_scale = ct.load(
                    weight_scales, (expert, up_block, k), (1, 1, 1), allow_tma=False, latency=1, check_bounds=False
                ).item()
                x = ct.load(rows, (k, i), (BLOCK, TILE_ROWS), order=(1, 0), latency=LATENCY, check_bounds=False)
                w = ct.load(
                    weights,
                    (expert, j + COLUMN_TILES, k),
                    (1, TILE_COLUMNS, BLOCK),
                    latency=LATENCY,
                    check_bounds=False,
                ).reshape((TILE_COLUMNS, BLOCK))
                gate += ct.mma(w, x, zeros, use_fast_acc=True) * (scale * gate_scale)
                w = ct.load(
                    weights, (expert, j, k), (1, TILE_COLUMNS, BLOCK), latency=LATENCY, check_bounds=False
                ).reshape((TILE_COLUMNS, BLOCK))
                up += ct.mma(w, x, zeros, use_fast_acc=True) * (scale * up_scale)
            inner = swiglu(up, gate, LIMIT, MINUS_LOG2_E)
            out_scale = scale_of(inner, 0, FP8_MAX, LEAST_AMAX)
            quantized = (inner * (1.0 / out_scale)).astype(out.dtype)
            ct.store(out, (i, j), ct.transpose(quantized), check_bounds=False)
            ct.store(out_scales, (j, i), out_scale, allow_tma=False, check_bounds=False)


def gemm1_few_rows(
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
    limit: float | None = None,
) -> Launch:
    """Write silu(gate) * up of every row tile in use, 8 to 64 rows each, to `out`, quantised.

    `rows` [R, H] float8_e4m3fn with `row_scales` [H/128, R] float32; `weights` [E, 2I, H] float8_e4m3fn, up then gate,
    with `weight_scales` [E, 2I/128, H/128] float32; `out` [R, I] float8_e4m3fn, quantised in blocks of 1 x
    `config.tile_columns`, with `out_scales` [I/tile_columns, R] float32. `blocks` is the size of the grid. With a
    `limit` up and gate are bounded as `expertd.kernels.numerics.swiglu` says.
    """
    column_tiles, steps = out.shape[1] // config.tile_columns, rows.shape[1] // BLOCK
    sizes = (tile_rows, config.tile_columns, column_tiles, steps, config.latency, BLOCK)
    floats = (MINUS_LOG2_E, FP8_MAX, LEAST_AMAX, limit_constant(limit))
    arrays = (rows, row_scales, weights, weight_scales, schedule.tile_experts, schedule.num_tiles, out, out_scales)
    kernel = hinted(gemm1_few_rows_kernel, config.num_worker_warps, config.occupancy)
    return Launch(kernel, (blocks,), (*arrays, *sizes, *floats))
