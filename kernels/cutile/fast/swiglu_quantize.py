"""SwiGLU of the first product's rows, quantised to FP8 for the second."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, take_turn
from expertd.kernels.cutile.base.limit import bounded, limit_constant
from expertd.kernels.cutile.fast.place_pairs import Schedule
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.quantize import FP8_MAX, LEAST_AMAX

ConstInt = Annotated[int, ct.ConstantAnnotation()]
ConstFloat = Annotated[float, ct.ConstantAnnotation()]
MINUS_LOG2_E = -1.4426950408889634
ROWS = 4
COLUMN_BLOCKS = 8
"""Most quantisation blocks of a row that a block of threads takes at once."""


def swiglu(up: ct.Tile, gate: ct.Tile, limit: float, minus_log2_e: float) -> ct.Tile:
    """In kernels: silu(gate) * up of FP32 tiles, bounded by `limit`."""
    up, gate = bounded(up, gate, limit)
    gate = ct.truediv(
        gate, 1.0 + ct.exp2(gate * minus_log2_e), rounding_mode=ct.RoundingMode.APPROX, flush_to_zero=True
    )
    return gate * up


def scale_of(inner: ct.Tile, axis: int, fp8_max: float, least_amax: float) -> ct.Tile:
    """In kernels: the scales of an FP32 tile whose blocks lie along `axis`."""
    return ct.maximum(ct.max(ct.abs(inner), axis=axis, keepdims=True), least_amax) * (1.0 / fp8_max)


@ct.kernel(occupancy=8)
def swiglu_quantize_kernel(
    up_gate: ct.Array,
    num_tiles: ct.Array,
    out: ct.Array,
    out_scales: ct.Array,
    TILE_ROWS: ConstInt,
    ROWS: ConstInt,
    BLOCKS: ConstInt,
    PARTS: ConstInt,
    BLOCK: ConstInt,
    MINUS_LOG2_E: ConstFloat,
    FP8_MAX: ConstFloat,
    LEAST_AMAX: ConstFloat,
    LIMIT: ConstFloat,
) -> None:
    take_turn()
    total = ct.load(num_tiles, (0,), (1,)).item() * (TILE_ROWS // ROWS) * PARTS
    for tile in range(ct.bid(0), total, ct.num_blocks(0)):
        i = tile // PARTS
        j = tile % PARTS
        up = ct.load(up_gate, (i, j), (ROWS, BLOCKS * BLOCK), allow_tma=False, check_bounds=False).astype(ct.float32)
        gate = ct.load(up_gate, (i, j + PARTS), (ROWS, BLOCKS * BLOCK), allow_tma=False, check_bounds=False)
        gate = gate.astype(ct.float32)
        inner = swiglu(up, gate, LIMIT, MINUS_LOG2_E).reshape((ROWS, BLOCKS, BLOCK))
        scale = scale_of(inner, 2, FP8_MAX, LEAST_AMAX)
        quantized = (inner * (1.0 / scale)).astype(out.dtype)
        ct.store(out, (i, j), quantized.reshape((ROWS, BLOCKS * BLOCK)), allow_tma=False, check_bounds=False)
        scale = ct.transpose(scale.reshape((ROWS, BLOCKS)))
        ct.store(out_scales, (j, i), scale, allow_tma=False, check_bounds=False)


def swiglu_quantize(
    up_gate: Tensor,
    schedule: Schedule,
    out: Tensor,
    out_scales: Tensor,
    tile_rows: int,
    blocks: int,
    limit: float | None = None,
) -> Launch:
    """Write silu(gate) * up of every row tile in use to `out`, quantised in 1x128 blocks.

    `up_gate` [R, 2I] bfloat16, up then gate; `out` [R, I] float8_e4m3fn with
    `out_scales` [I/128, R] float32. `blocks` is the size of the grid; `tile_rows` is a multiple of `ROWS`.
    With a `limit` up and gate are bounded as `expertd.kernels.numerics.swiglu` says.
    """
    quantized_blocks = out.shape[1] // BLOCK
    at_once = min(COLUMN_BLOCKS, quantized_blocks & -quantized_blocks)
    sizes = (tile_rows, ROWS, at_once, quantized_blocks // at_once, BLOCK)
    arrays = (up_gate, schedule.num_tiles, out, out_scales)
    floats = (MINUS_LOG2_E, FP8_MAX, LEAST_AMAX, limit_constant(limit))
    return Launch(swiglu_quantize_kernel, (blocks,), (*arrays, *sizes, *floats))
