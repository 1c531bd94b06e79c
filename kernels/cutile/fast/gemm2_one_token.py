"""One token: the second product of its experts, weighed and added up."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, hinted, take_turn
from expertd.kernels.cutile.fast.gemm1_one_token import ROWS
from expertd.kernels.cutile.fast.tiles import GemmConfig
from expertd.kernels.model.config import BLOCK

ConstInt = Annotated[int, ct.ConstantAnnotation()]


@ct.kernel
def gemm2_one_token_kernel(
    inner: ct.Array,
    inner_scales: ct.Array,
    expert_ids: ct.Array,
    choice_weights: ct.Array,
    weights: ct.Array,
    weight_scales: ct.Array,
    out: ct.Array,
    TOP_K: ConstInt,
    EXPERTS: ConstInt,
    TILE_COLUMNS: ConstInt,
    STEPS: ConstInt,
    LATENCY: ConstInt,
    ROWS: ConstInt,
    BLOCK: ConstInt,
) -> None:
    take_turn()
    j = ct.bid(0)
    total = ct.zeros((TILE_COLUMNS, ROWS), dtype=ct.float32)
    for choice in range(TOP_K):
        expert = ct.load(expert_ids, (0, choice), (1, 1), allow_tma=False).item()
        if (expert >= 0) & (expert < EXPERTS):
            zeros = ct.zeros((TILE_COLUMNS, ROWS), dtype=ct.float32)
            acc = ct.zeros((TILE_COLUMNS, ROWS), dtype=ct.float32)
            for k in range(STEPS):
                scale = ct.load(
                    inner_scales, (choice, k), (1, 1), allow_tma=False, latency=1, check_bounds=False
                ).item()
                block_scale = ct.load(
                    weight_scales,
                    (expert, j * TILE_COLUMNS // BLOCK, k),
                    (1, 1, 1),
                    allow_tma=False,
                    latency=1,
                    check_bounds=False,
                ).item()
                x = ct.load(inner, (k, choice), (BLOCK, ROWS), order=(1, 0), latency=LATENCY, check_bounds=False)
                w = ct.load(
                    weights, (expert, j, k), (1, TILE_COLUMNS, BLOCK), latency=LATENCY, check_bounds=False
                ).reshape((TILE_COLUMNS, BLOCK))
                acc += ct.mma(w, x, zeros, use_fast_acc=True) * (scale * block_scale)
            weight = ct.load(choice_weights, (0, choice), (1, 1), allow_tma=False).item()
            # Rounded as the rows are that other batches leave for `combine`.
            total = total + acc.astype(ct.bfloat16).astype(ct.float32) * weight
    token = ct.extract(total, (0, 0), (TILE_COLUMNS, 1)).reshape((1, TILE_COLUMNS))
    ct.store(out, (0, j), token.astype(out.dtype), allow_tma=False, check_bounds=False)


def gemm2_one_token(
    inner: Tensor,
    inner_scales: Tensor,
    expert_ids: Tensor,
    choice_weights: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    out: Tensor,
    config: GemmConfig,
) -> Launch:
    """Write `sum over j of choice_weights[0, j] * inner[8 * j] @ weights[expert_ids[0, j]].T` to `out` [1, H].

    `inner` [8 k, I] float8_e4m3fn, of which every eighth row counts, with `inner_scales` [k, I/128] float32;
    `expert_ids` [1, k] int32, `choice_weights` [1, k] float32; `weights` [E, H, I] float8_e4m3fn with `weight_scales`
    [E, H/128, I/128] float32. `out` is bfloat16 or float32. The sum is in FP32, one choice after the other.
    """
    top_k, steps = expert_ids.shape[1], inner.shape[1] // BLOCK
    sizes = (top_k, len(weights), config.tile_columns, steps, config.latency, ROWS, BLOCK)
    arrays = (inner, inner_scales, expert_ids, choice_weights, weights, weight_scales, out)
    grid = (out.shape[1] // config.tile_columns,)
    return Launch(hinted(gemm2_one_token_kernel, config.num_worker_warps, config.occupancy), grid, (*arrays, *sizes))
