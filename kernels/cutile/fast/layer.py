"""The fast pipeline of one layer: FP8 products with block scales in the K loop, and a second quantisation between."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch
from expertd.kernels.cutile.base.shape import MAX_ELEMENTS, max_row_tiles
from expertd.kernels.cutile.fast.combine import combine
from expertd.kernels.cutile.fast.count_pairs import TOKENS, count_pairs
from expertd.kernels.cutile.fast.fp8_gemm import fp8_gemm
from expertd.kernels.cutile.fast.fp8_gemm_few_rows import fp8_gemm_few_rows
from expertd.kernels.cutile.fast.gather_rows import gather_rows
from expertd.kernels.cutile.fast.gemm1_few_rows import gemm1_few_rows
from expertd.kernels.cutile.fast.gemm1_one_token import ROWS, gemm1_one_token
from expertd.kernels.cutile.fast.gemm1_wide import gemm1_wide
from expertd.kernels.cutile.fast.gemm2_one_token import gemm2_one_token
from expertd.kernels.cutile.fast.place_pairs import Schedule, place_pairs
from expertd.kernels.cutile.fast.swiglu_one_token import swiglu_one_token
from expertd.kernels.cutile.fast.swiglu_quantize import swiglu_quantize
from expertd.kernels.cutile.fast.tiles import GemmConfig, LayerConfig
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch

SPLIT_BYTES = 64 << 20
SWIGLU_OCCUPANCY = 16
"""Blocks of `swiglu_quantize` that a multiprocessor runs at once, about."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Device memory that a layer's kernels share; every batch overwrites it."""

    rows: Tensor
    """[R, H] float8_e4m3fn: tokens' rows in sorted order."""
    row_scales: Tensor
    """[H/128 * R] float32, viewed by `_scales`."""
    up_gate: Tensor
    """[R, 2I] bfloat16: rows of the first product, where SwiGLU is a kernel of its own."""
    partial_up_gate: Tensor
    """[SPLIT_BYTES / 4] float32: the first product in parts of K, for one token."""
    inner: Tensor
    """[R, I] float8_e4m3fn: what the first product leaves for the second."""
    inner_scales: Tensor
    """[I/64 * R] float32, viewed by `_scales` for quantisation blocks of 1 x q."""
    outputs: Tensor
    """[R, H] bfloat16: rows of the second product."""
    schedule: Schedule

    @classmethod
    def allocate(
        cls, max_tokens: int, top_k: int, weights: LayerWeights, tile_rows: int, device: torch.device | str
    ) -> Workspace:
        """Room for batches of up to `max_tokens` tokens with `top_k` ids each, in tiles of up to `tile_rows` rows.

        Raises `ValueError` where the kernels' 32-bit offsets do not reach that far.
        """
        experts, width, inner = weights.down.shape
        tiles = max_row_tiles(max_tokens, top_k, experts, tile_rows)
        rows = tiles * tile_rows
        if rows * max(width, 2 * inner) >= MAX_ELEMENTS:
            raise ValueError(f"{max_tokens} tokens of {top_k} top_k need more rows than 32-bit offsets reach")
        blocks = -(-max_tokens // TOKENS)
        fp8, f32, i32 = torch.float8_e4m3fn, torch.float32, torch.int32

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            rows=empty(rows, width, dtype=fp8),
            row_scales=empty(width // BLOCK * rows, dtype=f32),
            up_gate=empty(rows, 2 * inner, dtype=torch.bfloat16),
            partial_up_gate=empty(SPLIT_BYTES // 4, dtype=f32),
            inner=empty(rows, inner, dtype=fp8),
            inner_scales=empty(inner // 64 * rows, dtype=f32),
            outputs=empty(rows, width, dtype=torch.bfloat16),
            schedule=Schedule(
                pair_rows=empty(max_tokens, top_k, dtype=i32),
                pairs=empty(experts, dtype=i32),
                tile_experts=empty(max_row_tiles(max_tokens, top_k, experts, 8), dtype=i32),
                num_tiles=empty(1, dtype=i32),
                counts=empty(blocks, 1 << (experts - 1).bit_length(), dtype=i32),
            ),
        )


def layer_launches(
    batch: TokenBatch, weights: LayerWeights, sums: Tensor, workspace: Workspace, config: LayerConfig, processors: int
) -> list[Launch]:
    """The kernels that compute `sums` [T, H] and `workspace.schedule.pairs` for `batch`, in order.

    `batch.hidden` is FP8 with scales; T is at most what the workspace was allocated for. `processors` is the device's
    number of multiprocessors.
    """
    return [launch for step in layer_steps(batch, weights, sums, workspace, config, processors, 1) for launch in step]


def layer_steps(
    batch: TokenBatch,
    weights: LayerWeights,
    sums: Tensor,
    workspace: Workspace,
    config: LayerConfig,
    processors: int,
    steps: int,
) -> list[list[Launch]]:
    """The same kernels in `steps`, each of which leaves as many columns of `sums`, with the same bits.

    Nothing is computed twice: the second product and the sums alone are cut, by columns; H / `steps` is whole blocks.
    """
    tokens, top_k = batch.expert_ids.shape
    if steps == 1 and config.single and tokens == 1 and ROWS * top_k <= len(workspace.rows):
        cut = [_one_token_launches(batch, weights, sums, workspace, config)]
    else:
        cut = _sorted_launches(batch, weights, sums, workspace, config, processors, steps)
    return [[first, *(replace(launch, overlaps=config.overlaps) for launch in others)] for first, *others in cut]


def _one_token_launches(
    batch: TokenBatch, weights: LayerWeights, sums: Tensor, workspace: Workspace, config: LayerConfig
) -> list[Launch]:
    """Kernels that go through the token's choices by themselves, so that nothing is sorted."""
    ids, width = batch.expert_ids, weights.down.shape[2]
    top_k, steps = ids.shape[1], batch.hidden.shape[1] // BLOCK
    shape = (config.gemm1.splits if steps % config.gemm1.splits == 0 else 1, top_k, 2 * width)
    products = workspace.partial_up_gate[: math.prod(shape)].view(shape)
    inner = workspace.inner.view(-1)[: ROWS * top_k * width].view(-1, width)
    inner_scales = workspace.inner_scales[: top_k * width // BLOCK].view(top_k, -1)
    up_gate, down = (weights.up_gate, weights.up_gate_scales), (weights.down, weights.down_scales)
    return [
        gemm1_one_token(batch.hidden, _scales_of(batch), ids, *up_gate, products, config.gemm1),
        swiglu_one_token(products, ids, inner, inner_scales, workspace.schedule.pairs, weights.swiglu_limit),
        gemm2_one_token(inner, inner_scales, ids, batch.weights, *down, sums, config.gemm2),
    ]


def _sorted_launches(
    batch: TokenBatch,
    weights: LayerWeights,
    sums: Tensor,
    workspace: Workspace,
    config: LayerConfig,
    processors: int,
    steps: int,
) -> list[list[Launch]]:
    """Kernels that sort (token, expert) pairs by expert, and compute in tiles of rows."""
    tokens, top_k = batch.expert_ids.shape
    tiles = max_row_tiles(tokens, top_k, weights.num_experts, config.tile_rows)
    schedule = _first_tokens(workspace.schedule, tokens, top_k, tiles)
    rows, inner = workspace.rows, workspace.inner
    gemm1 = config.gemm1
    quantum = gemm1.tile_columns if gemm1.few_rows else BLOCK
    row_scales = _scales(workspace.row_scales, rows, BLOCK, gemm1)
    inner_scales = _scales(workspace.inner_scales, inner, quantum, config.gemm2)

    def blocks(gemm: GemmConfig, columns: int) -> int:
        needed = tiles * (columns // gemm.tile_columns)
        return min(needed, processors * gemm.occupancy) if gemm.persistent else needed

    def product(a: Tensor, scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor, gemm: GemmConfig) -> Launch:
        kernel = fp8_gemm_few_rows if gemm.few_rows else fp8_gemm
        return kernel(a, scales, b, b_scales, schedule, out, config.tile_rows, gemm, blocks(gemm, out.shape[1]))

    def last(columns: slice) -> list[Launch]:
        blocks_there = slice(columns.start // BLOCK, columns.stop // BLOCK)
        out, down, down_scales = workspace.outputs[:, columns], weights.down[:, columns], weights.down_scales
        return [
            product(inner, inner_scales, down, down_scales[:, blocks_there], out, config.gemm2),
            combine(out, schedule.pair_rows, batch.weights, sums[:, columns]),
        ]

    launches = [count_pairs(batch.expert_ids, schedule.counts)] if tokens > TOKENS else []
    launches += [
        place_pairs(batch.expert_ids, schedule, config.tile_rows),
        gather_rows(batch.hidden, _scales_of(batch), schedule.pair_rows, rows, row_scales),
    ]
    up_gate, up_gate_scales = weights.up_gate, weights.up_gate_scales
    if gemm1.few_rows or gemm1.wide:
        kernel = gemm1_few_rows if gemm1.few_rows else gemm1_wide
        first = (up_gate, up_gate_scales, schedule, inner, inner_scales, config.tile_rows, gemm1)
        launches.append(kernel(rows, row_scales, *first, blocks(gemm1, inner.shape[1]), weights.swiglu_limit))
    else:
        swiglu_blocks = min(tiles * config.tile_rows, processors * SWIGLU_OCCUPANCY)
        products = (workspace.up_gate, schedule, inner, inner_scales)
        launches += [
            product(rows, row_scales, up_gate, up_gate_scales, workspace.up_gate, gemm1),
            swiglu_quantize(*products, config.tile_rows, swiglu_blocks, weights.swiglu_limit),
        ]
    share = sums.shape[1] // steps
    head, *rest = (last(slice(begin, begin + share)) for begin in range(0, steps * share, share))
    return [[*launches, *head], *rest]


def _scales_of(batch: TokenBatch) -> Tensor:
    if batch.scales is None:
        raise ValueError("the fast pipeline takes FP8 hidden states with scales")
    return batch.scales


def _scales(memory: Tensor, rows: Tensor, quantum: int, gemm: GemmConfig) -> Tensor:
    """`memory` as scales [K/quantum, R] of `rows` [R, K], laid out for the product that reads them.

    Products of few rows find a row's next scale beside its last; the others load those of a tile's rows together.
    """
    scales = memory[: rows.numel() // quantum]
    return scales.view(len(rows), -1).t() if gemm.few_rows else scales.view(-1, len(rows))


def _first_tokens(schedule: Schedule, tokens: int, top_k: int, tiles: int) -> Schedule:
    """The part of a workspace's schedule that `tokens` tokens of `top_k` ids and at most `tiles` row tiles use."""
    return Schedule(
        pair_rows=schedule.pair_rows.view(-1)[: tokens * top_k].view(tokens, top_k),
        pairs=schedule.pairs,
        tile_experts=schedule.tile_experts[:tiles],
        num_tiles=schedule.num_tiles,
        counts=schedule.counts,
    )
