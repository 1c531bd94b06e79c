"""One launch for the matrix products of all experts that have work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.launch import Launch, hinted

ConstInt = Annotated[int, ct.ConstantAnnotation()]


@dataclass(frozen=True, slots=True)
class GroupGemmConfig:
    """What the tuner chooses: tile sizes, the order of the walk over tiles, and hints to the compiler."""

    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 64
    group: int = 8
    """Row tiles walked before the next column tile, so that their columns of B stay in L2."""
    num_worker_warps: int = 8
    occupancy: int = 1
    latency: int = 4
    """How heavy the compiler takes the loads' traffic to be, 1 to 10: more means deeper pipelines."""


@ct.kernel
def group_gemm_kernel(
    a: ct.Array,
    b: ct.IndexedWithInt64[ct.Array],
    counts: ct.Array,
    out: ct.Array,
    TILE_M: ConstInt,
    TILE_N: ConstInt,
    TILE_K: ConstInt,
    GROUP: ConstInt,
    LATENCY: ConstInt,
) -> None:
    blocks = ct.num_blocks(0)
    block = ct.bid(0)
    column_tiles = ct.cdiv(out.shape[1], TILE_N)
    first_row = 0
    tiles_before = 0
    for slot in range(counts.shape[0]):
        rows = ct.load(counts, (slot,), (1,)).item()
        row_tiles = ct.cdiv(rows, TILE_M)
        tiles = row_tiles * column_tiles
        a_rows = a.slice(0, first_row, first_row + rows)
        out_rows = out.slice(0, first_row, first_row + rows)
        # Blocks take the tiles of all experts round robin, so this expert's go on where the last one's ended.
        for tile in range((block + blocks - tiles_before % blocks) % blocks, tiles, blocks):
            first = tile // (GROUP * column_tiles) * GROUP
            grouped = min(row_tiles - first, GROUP)
            within = tile % (GROUP * column_tiles)
            i = first + within % grouped
            j = within // grouped
            acc = ct.zeros((TILE_M, TILE_N), dtype=ct.float32)
            for k in range(ct.cdiv(a.shape[1], TILE_K)):
                rows_k = ct.load(a_rows, (i, k), (TILE_M, TILE_K), padding_mode=ct.PaddingMode.ZERO, latency=LATENCY)
                columns_k = ct.load(b, (slot, k, j), (1, TILE_K, TILE_N), order=(0, 2, 1), latency=LATENCY)
                acc = ct.mma(rows_k, columns_k.reshape((TILE_K, TILE_N)), acc)
            ct.store(out_rows, (i, j), acc.astype(out.dtype))
        first_row += rows
        tiles_before += tiles


def group_gemm(a: Tensor, b: Tensor, counts: Tensor, out: Tensor, config: GroupGemmConfig, blocks: int) -> Launch:
    """Write `a_s @ b[s].T` to `out_s` for every slot s, the s-th run of `counts[s]` rows of `a` and `out`.

    `a` is [P, K] bfloat16, `b` [S, N, K] bfloat16, `counts` [S] int32, `out` [P, N] float32 or bfloat16; K is a
    multiple of `tile_k`. Rows past the sum of `counts` are left as they are. `blocks` is the size of the persistent
    grid: as many blocks as the device runs at once.
    """
    kernel = hinted(group_gemm_kernel, config.num_worker_warps, config.occupancy)
    tiles = (config.tile_m, config.tile_n, config.tile_k, config.group, config.latency)
    return Launch(kernel, (blocks,), (a, b, counts, out, *tiles))


def candidates(arch: str, shape_class: int) -> list[GroupGemmConfig]:
    """Configurations worth measuring on `arch` ("sm_90", ...) for batches of up to `shape_class` tokens."""
    few_rows = [
        GroupGemmConfig(64, 64, 64),
        GroupGemmConfig(64, 64, 64, latency=8),
        GroupGemmConfig(64, 64, 128, latency=8),
        GroupGemmConfig(64, 128, 64),
        GroupGemmConfig(64, 128, 128),
    ]
    many_rows = [
        GroupGemmConfig(128, 128, 64),
        GroupGemmConfig(128, 256, 64),
        GroupGemmConfig(128, 256, 64, group=16),
        GroupGemmConfig(256, 128, 64),
        GroupGemmConfig(256, 128, 64, group=4),
    ]
    return few_rows if shape_class <= 256 else few_rows[3:] + many_rows
