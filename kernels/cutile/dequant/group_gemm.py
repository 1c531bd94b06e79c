"""One launch for the matrix products of all experts that have work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, hinted

ConstInt = Annotated[int, ct.ConstantAnnotation()]
TILES_M = (64, 128, 256)
"""Row tiles that `candidates` knows configurations for."""


@dataclass(frozen=True, slots=True)
class GroupGemmConfig:
    """What the tuner chooses: tile sizes, the order of the walk over tiles, and hints to the compiler."""

    tile_n: int = 256
    tile_k: int = 64
    num_worker_warps: int = 8
    occupancy: int = 1
    latency: int = 4
    """How heavy the compiler takes the loads' traffic to be, 1 to 10: more means deeper pipelines."""
    group: int = 8
    """Row tiles walked before the next column tile, so that their columns of B stay in L2."""


@ct.kernel
def group_gemm_kernel(
    a: ct.Array,
    b: ct.Array,
    tile_slots: ct.Array,
    num_tiles: ct.Array,
    out: ct.Array,
    TILE_M: ConstInt,
    TILE_N: ConstInt,
    TILE_K: ConstInt,
    GROUP: ConstInt,
    LATENCY: ConstInt,
) -> None:
    row_tiles = ct.load(num_tiles, (0,), (1,)).item()
    column_tiles = ct.cdiv(out.shape[1], TILE_N)
    for tile in range(ct.bid(0), row_tiles * column_tiles, ct.num_blocks(0)):
        first = tile // (GROUP * column_tiles) * GROUP
        grouped = min(row_tiles - first, GROUP)
        within = tile % (GROUP * column_tiles)
        i = first + within % grouped
        j = within // grouped
        slot = ct.load(tile_slots, (i,), (1,)).item()
        acc = ct.zeros((TILE_M, TILE_N), dtype=ct.float32)
        for k in range(ct.cdiv(a.shape[1], TILE_K)):
            rows_k = ct.load(a, (i, k), (TILE_M, TILE_K), latency=LATENCY)
            columns_k = ct.load(b, (slot, k, j), (1, TILE_K, TILE_N), order=(0, 2, 1), latency=LATENCY)
            acc = ct.mma(rows_k, columns_k.reshape((TILE_K, TILE_N)), acc)
        ct.store(out, (i, j), acc.astype(out.dtype))


def group_gemm(
    a: Tensor,
    b: Tensor,
    tile_slots: Tensor,
    num_tiles: Tensor,
    out: Tensor,
    tile_m: int,
    config: GroupGemmConfig,
    processors: int,
) -> Launch:
    """Write `a[rows] @ b[slot].T` to `out[rows]` for each of the first `num_tiles` tiles of `tile_m` rows.

    `a` is [R, K] and `b` [S, N, K], both float16 or both bfloat16, `out` [R, N] float32 or bfloat16; K is a multiple
    of 128. The slot of tile i is `tile_slots[i]`; both that and `num_tiles` [1] are int32 on the device, so that the
    host need not know how many rows each expert has. As many blocks as `processors` multiprocessors run at once take
    tile after tile.
    """
    kernel = hinted(group_gemm_kernel, config.num_worker_warps, config.occupancy)
    tiles = (tile_m, config.tile_n, config.tile_k, config.group, config.latency)
    return Launch(kernel, (processors * config.occupancy,), (a, b, tile_slots, num_tiles, out, *tiles))


def candidates(arch: str, tile_m: int) -> tuple[GroupGemmConfig, ...]:
    """Configurations worth measuring on `arch` ("sm_90", ...) with row tiles of `tile_m`, the best guess first.

    None of them spills registers there, and on Hopper each keeps several matrix instructions in flight; see
    docs/measurements.md for those that do not. An architecture between two known ones takes the older one's.
    """
    known = max(number for number in _CANDIDATES if number <= int(arch.removeprefix("sm_")))
    return _CANDIDATES[known].get(tile_m, ())


_SMALL = GroupGemmConfig(64, 64, num_worker_warps=4, occupancy=2)
_CANDIDATES: dict[int, dict[int, tuple[GroupGemmConfig, ...]]] = {
    80: {
        64: (GroupGemmConfig(128, 64, num_worker_warps=4, occupancy=2), _SMALL),
        128: (GroupGemmConfig(128, 64, num_worker_warps=4),),
    },
    89: {64: (GroupGemmConfig(128, 64, num_worker_warps=4, occupancy=2), _SMALL)},
    90: {
        64: (
            GroupGemmConfig(128, 128, num_worker_warps=4, occupancy=2),
            GroupGemmConfig(128, 128, latency=8),
            GroupGemmConfig(64, 128, num_worker_warps=4, occupancy=2),
            GroupGemmConfig(64, 128, num_worker_warps=4, occupancy=2, latency=8),
        ),
        128: (GroupGemmConfig(256, 64), GroupGemmConfig(256, 64, group=4), GroupGemmConfig(256, 64, group=16)),
        256: (GroupGemmConfig(128, 64), GroupGemmConfig(128, 64, group=4)),
    },
    100: {
        64: (GroupGemmConfig(128, 64), _SMALL),
        128: (GroupGemmConfig(256, 64), GroupGemmConfig(128, 64, num_worker_warps=4, occupancy=2)),
        256: (GroupGemmConfig(128, 64),),
    },
    120: {
        64: (GroupGemmConfig(128, 64), _SMALL),
        128: (GroupGemmConfig(256, 64), GroupGemmConfig(128, 64, num_worker_warps=4, occupancy=2)),
        256: (GroupGemmConfig(128, 64),),
    },
}
