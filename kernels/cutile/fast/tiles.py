"""How the fast pipeline cuts its work: tile sizes and compiler hints, by shape class."""

from __future__ import annotations

from dataclasses import dataclass, replace

from expertd.kernels.cutile.base.shape import shape_class


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
    splits: int = 1
    """Parts of K that blocks of their own compute, where there are too few tiles; one token and first product only."""
    scales_in_shared: bool = False
    """Whether the rows' scales come through shared memory, which spares registers, or straight to registers."""
    wide: bool = False
    """Whether a tile of 64 rows takes 128 columns of up and the same of gate, with SwiGLU; first product only."""
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
    single: bool = False
    """Whether one token is not sorted: its products go through its choices by themselves, three kernels in all."""
    overlaps: bool = False
    """Whether a kernel's blocks start while the kernel before it ends, and wait for it there."""

    @property
    def few_rows(self) -> bool:
        """Whether either product is a transposed one."""
        return self.gemm1.few_rows or self.gemm2.few_rows


FEW_8 = LayerConfig(
    8,
    GemmConfig(few_rows=True, tile_columns=64, latency=8, unroll=1, num_worker_warps=4, occupancy=2),
    GemmConfig(few_rows=True, tile_columns=64, latency=8, unroll=1, num_worker_warps=4, occupancy=2),
)
WIDE = GemmConfig()
"""For tiles of 128 rows."""
PAIRED = GemmConfig(num_worker_warps=4, occupancy=2, scales_in_shared=True)
"""For tiles of 64 rows: a multiprocessor runs two blocks, so that one computes while the other stores its tile."""
DEEP = GemmConfig(scales_in_shared=True)
"""For few tiles of 64 rows, each of which is waited for: six blocks of K on their way at once."""
BOTH = GemmConfig(wide=True, latency=3, scales_in_shared=True)
"""For one or two tiles of 64 rows an expert, whose time is that of reading weights: up and gate share the rows."""
FEW = GemmConfig(few_rows=True, latency=8, unroll=1, occupancy=2)
SINGLE = LayerConfig(8, replace(FEW_8.gemm1, splits=4), FEW_8.gemm2, single=True, overlaps=True)
DEFAULTS = {
    1: SINGLE,
    8: FEW_8,
    64: LayerConfig(8, FEW_8.gemm1, FEW),
    256: LayerConfig(16, FEW, FEW),
    1024: LayerConfig(64, BOTH, PAIRED, overlaps=True),
    2048: LayerConfig(64, PAIRED, PAIRED),
    4096: LayerConfig(64, PAIRED, PAIRED),
    8192: LayerConfig(128, WIDE, WIDE),
    16384: LayerConfig(128, WIDE, WIDE),
}
"""By shape class, from measurements on an H200 (docs/measurements.md)."""
INVARIANT = LayerConfig(64, DEEP, DEEP)


def default_config(arch: str, num_tokens: int, batch_invariant: bool = False) -> LayerConfig:
    """The configuration for a shape that nothing was measured for on `arch` ("sm_90", ...).

    On sm_120, where sums stay in registers, larger tiles and two blocks a multiprocessor spill: from what the compiler
    shows, because no such GPU was measured.

    If `batch_invariant`, one that rounds like that of every other shape class: no tile of few rows, whose kernels keep
    FP32 between the first product and SwiGLU where the others keep BF16.
    """
    config = DEFAULTS[shape_class(num_tokens)]
    if config.few_rows:
        return INVARIANT if batch_invariant else config
    return INVARIANT if arch.startswith("sm_12") else config


def gathering(config: LayerConfig) -> LayerConfig:
    """What computes the same bits and reads a batch once, in one kernel, as where it lies in the host's memory.

    Kernels that go through a token's choices read it in every block, which took 176 us from there and not 20.
    """
    return (
        replace(config, gemm1=replace(config.gemm1, splits=1), single=False, overlaps=False)
        if config.single
        else config
    )


def candidates(arch: str, num_tokens: int) -> list[LayerConfig]:
    """What the tuner tries for a shape class, the default for `arch` first."""
    few = [
        LayerConfig(rows, replace(FEW, tile_columns=columns, latency=latency), replace(FEW, latency=latency))
        for rows in (8, 16, 32)
        for columns in (64, 128)
        for latency in (4, 8)
    ]
    wide = [
        LayerConfig(rows, replace(gemm, group=group), replace(gemm, group=group))
        for rows, gemm in ((64, DEEP), (64, PAIRED), (128, WIDE))
        for group in (4, 8, 16)
    ]
    wide.append(LayerConfig(64, BOTH, PAIRED, overlaps=True))
    default = default_config(arch, num_tokens)
    tried = few + wide[:3] if num_tokens <= 256 else wide
    return [default, *(config for config in tried if config != default)]
