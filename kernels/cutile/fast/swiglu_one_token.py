"""One token: SwiGLU of its experts' rows, quantised to FP8, and how many pairs each expert has."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, take_turn
from expertd.kernels.cutile.base.limit import limit_constant
from expertd.kernels.cutile.fast.gemm1_one_token import ROWS
from expertd.kernels.cutile.fast.swiglu_quantize import MINUS_LOG2_E, scale_of, swiglu
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.quantize import FP8_MAX, LEAST_AMAX

ConstInt = Annotated[int, ct.ConstantAnnotation()]
ConstFloat = Annotated[float, ct.ConstantAnnotation()]


@ct.kernel
def swiglu_one_token_kernel(
    up_gate: ct.Array,
    expert_ids: ct.Array,
    out: ct.Array,
    out_scales: ct.Array,
    pairs: ct.Array,
    SPLITS: ConstInt,
    TOP_K: ConstInt,
    EXPERTS: ConstInt,
    PARTS: ConstInt,
    ROWS: ConstInt,
    BLOCK: ConstInt,
    MINUS_LOG2_E: ConstFloat,
    FP8_MAX: ConstFloat,
    LEAST_AMAX: ConstFloat,
    LIMIT: ConstFloat,
) -> None:
    take_turn()
    choice = ct.bid(0)
    j = ct.bid(1)
    # Rows of choices without a local expert are computed, too, from whatever is there: nobody reads what comes of them.
    up = ct.zeros((1, BLOCK), dtype=ct.float32)
    gate = ct.zeros((1, BLOCK), dtype=ct.float32)
    for split in ct.static_iter(range(SPLITS)):
        part = ct.load(up_gate, (split, choice, j), (1, 1, BLOCK), allow_tma=False, check_bounds=False)
        up = up + part.reshape((1, BLOCK))
        part = ct.load(up_gate, (split, choice, j + PARTS), (1, 1, BLOCK), allow_tma=False, check_bounds=False)
        gate = gate + part.reshape((1, BLOCK))
    inner = swiglu(up, gate, LIMIT, MINUS_LOG2_E)
    scale = scale_of(inner, 1, FP8_MAX, LEAST_AMAX)
    quantized = (inner * (1.0 / scale)).astype(out.dtype)
    ct.store(out, (choice * ROWS, j), quantized, allow_tma=False, check_bounds=False)
    ct.store(out_scales, (choice, j), scale, allow_tma=False, check_bounds=False)
    if choice + j == 0:
        expert = ct.arange(EXPERTS, dtype=ct.int32).reshape((1, EXPERTS))
        slot = ct.arange(TOP_K, dtype=ct.int32).reshape((TOP_K, 1))
        chosen = ct.gather(expert_ids, (0, slot), padding_value=-1)
        counted = ct.sum((chosen == expert).astype(ct.int32), axis=0)
        ct.scatter(pairs, expert.reshape((EXPERTS,)), counted)


def swiglu_one_token(
    up_gate: Tensor, expert_ids: Tensor, out: Tensor, out_scales: Tensor, pairs: Tensor, limit: float | None = None
) -> Launch:
    """Write silu(gate) * up of each choice to `out`, quantised in 1x128 blocks, and `pairs` [E] int32.

    `up_gate` [splits, k, 2I] float32, up then gate, parts of a sum; `expert_ids` [1, k] int32; `out` [8 k, I]
    float8_e4m3fn, of which every eighth row is written, with `out_scales` [k, I/128] float32.
    """
    splits, top_k, width = up_gate.shape
    parts = width // 2 // BLOCK
    padded = tuple(1 << (n - 1).bit_length() for n in (top_k, len(pairs)))
    floats = (MINUS_LOG2_E, FP8_MAX, LEAST_AMAX, limit_constant(limit))
    arrays = (up_gate, expert_ids, out, out_scales, pairs)
    return Launch(swiglu_one_token_kernel, (top_k, parts), (*arrays, splits, *padded, parts, ROWS, BLOCK, *floats))
