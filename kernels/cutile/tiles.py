"""How the fast pipeline cuts its work: tile sizes and compiler hints, and the shape class that chooses among them."""

from __future__ import annotations

from dataclasses import dataclass

SHAPE_CLASSES = (1, 8, 64, 256, 1024, 2048, 4096, 8192, 16384)
"""Largest token counts of the classes; a larger batch runs with the configuration of the last one."""


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """What the tuner chooses for one of the two matrix products."""

    few_rows: bool = False
    """Whether the weights are the left operand (the transpose), for tiles of 8 to 64 rows."""
    tile_columns: int = 128
    """Rows of the weight matrix that one tile takes: 64 or 128."""
    latency: int = 4
    """How heavy the compiler takes the loads' traffic to be, 1 to 10: more means deeper pipelines."""
    unroll: int = 2
    """Blocks of K that one turn of the loop takes: with two, the scaling of one runs beside the product of the next."""
    num_worker_warps: int = 8
    occupancy: int = 1
    group: int = 8
    """Row tiles walked before the next column tile, so that one expert's weights stay in L2."""
    persistent: bool = True
    """As many blocks as the device runs at once, each taking tile after tile, or one block for each tile."""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """How one shape class runs a layer."""

    tile_rows: int
    """(token, expert) pairs of a tile; every expert's rows are padded to a multiple of it."""
    gemm1: GemmConfig
    gemm2: GemmConfig


def shape_class(num_tokens: int) -> int:
    """The class of a batch: the smallest of `SHAPE_CLASSES` that holds it, or the last."""
    return next((bound for bound in SHAPE_CLASSES if num_tokens <= bound), SHAPE_CLASSES[-1])


def max_row_tiles(num_tokens: int, slots: int, num_experts: int, tile_rows: int) -> int:
    """Most row tiles that `num_tokens` tokens with `slots` expert ids each can need."""
    pairs = num_tokens * min(slots, num_experts)
    return min(pairs, num_experts + pairs // tile_rows)
