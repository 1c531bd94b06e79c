"""The first product of the experts with SwiGLU, for tiles of 64 rows: 128 columns of up and the same of gate."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, hinted, take_turn
from expertd.kernels.cutile.base.limit import limit_constant
from expertd.kernels.cutile.fast.fp8_gemm import tile_position
from expertd.kernels.cutile.fast.place_pairs import Schedule
from expertd.kernels.cutile.fast.swiglu_quantize import MINUS_LOG2_E, scale_of, swiglu
from expertd.kernels.cutile.fast.tiles import GemmConfig
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.quantize import FP8_MAX, LEAST_AMAX

ConstInt = Annotated[int, ct.ConstantAnnotation()]
ConstFloat = Annotated[float, ct.ConstantAnnotation()]


@ct.kernel
def gemm1_wide_kernel(
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
    UNROLL: ConstInt,
    GROUP: ConstInt,
    LATENCY: ConstInt,
    SCALES_IN_SHARED: ConstInt,
    BLOCK: ConstInt,
    MINUS_LOG2_E: ConstFloat,
    FP8_MAX: ConstFloat,
    LEAST_AMAX: ConstFloat,
    LIMIT: ConstFloat,
) -> None:
    take_turn()
    row_tiles = ct.load(num_tiles, (0,), (1,)).item()
    # No branch may enclose the loop over K: the compiler would have the loads of a tile wait for the tile before it.
    for tile in range(ct.bid(0), row_tiles * COLUMN_TILES, ct.num_blocks(0)):
        i, j = tile_position(tile, row_tiles, COLUMN_TILES, GROUP)
        expert = ct.gather(tile_experts, i, check_bounds=False)
        zeros = ct.zeros((TILE_ROWS, BLOCK), dtype=ct.float32)
        up = ct.zeros((TILE_ROWS, BLOCK), dtype=ct.float32)
        gate = ct.zeros((TILE_ROWS, BLOCK), dtype=ct.float32)
        for step in range(STEPS // UNROLL):
            for part in ct.static_iter(range(UNROLL)):
                k = step * UNROLL + part
                if SCALES_IN_SHARED:
                    scale = ct.load(row_scales, (k, i), (1, TILE_ROWS), latency=LATENCY, check_bounds=False)
                else:
                    scale = ct.load(row_scales, (k, i), (1, TILE_ROWS), allow_tma=False, latency=1, check_bounds=False)
                up_scale = ct.load(
                    weight_scales, (expert, j, k), (1, 1, 1), allow_tma=False, latency=1, check_bounds=False
                ).item()
                gate_scale = ct.load(
                    weight_scales,
                    (expert, j + COLUMN_TILES, k),
                    (1, 1, 1),
                    allow_tma=False,
                    latency=1,
                    check_bounds=False,
                ).item()
                a = ct.load(rows, (i, k), (TILE_ROWS, BLOCK), latency=LATENCY, check_bounds=False)
                b = ct.load(
                    weights, (expert, k, j), (1, BLOCK, BLOCK), order=(0, 2, 1), latency=LATENCY, check_bounds=False
                ).reshape((BLOCK, BLOCK))
                up += ct.mma(a, b, zeros, use_fast_acc=True) * (scale.reshape((TILE_ROWS, 1)) * up_scale)
                b = ct.load(
                    weights,
                    (expert, k, j + COLUMN_TILES),
                    (1, BLOCK, BLOCK),
                    order=(0, 2, 1),
                    latency=LATENCY,
                    check_bounds=False,
                ).reshape((BLOCK, BLOCK))
                gate += ct.mma(a, b, zeros, use_fast_acc=True) * (scale.reshape((TILE_ROWS, 1)) * gate_scale)
        # Rounded to what the two kernels leave between them, whose bits these are.
        up = up.astype(ct.bfloat16).astype(ct.float32)
        gate = gate.astype(ct.bfloat16).astype(ct.float32)
        inner = swiglu(up, gate, LIMIT, MINUS_LOG2_E)
        out_scale = scale_of(inner, 1, FP8_MAX, LEAST_AMAX)
        quantized = (inner * (1.0 / out_scale)).astype(out.dtype)
        ct.store(out, (i, j), quantized, check_bounds=False)
        ct.store(out_scales, (j, i), ct.transpose(out_scale), allow_tma=False, check_bounds=False)


def gemm1_wide(
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
    """Write silu(gate) * up of every row tile in use to `out`, quantised in 1x128 blocks.

    `rows` [R, H] float8_e4m3fn with `row_scales` [H/128, R] float32; `weights` [E, 2I, H] float8_e4m3fn, up then gate,
    with `weight_scales` [E, 2I/128, H/128] float32; `out` [R, I] float8_e4m3fn with `out_scales` [I/128, R] float32.
    `blocks` is the size of the grid. Its bits are those of `fp8_gemm` and `swiglu_quantize`.
    """
    column_tiles, steps = out.shape[1] // BLOCK, rows.shape[1] // BLOCK
    unroll = config.unroll if steps % config.unroll == 0 else 1
    sizes = (tile_rows, column_tiles, steps, unroll, config.group, config.latency, int(config.scales_in_shared), BLOCK)
    floats = (MINUS_LOG2_E, FP8_MAX, LEAST_AMAX, limit_constant(limit))
    arrays = (rows, row_scales, weights, weight_scales, schedule.tile_experts, schedule.num_tiles, out, out_scales)
    kernel = hinted(gemm1_wide_kernel, config.num_worker_warps, config.occupancy)
    return Launch(kernel, (blocks,), (*arrays, *sizes, *floats))
