"""Loading experts from a checkpoint into host memory: a layer's as backends take them, or one's as plain numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import LayerWeights
from expertd.kernels.numerics.mxfp4 import PACKED, round_to_blocks
from expertd.kernels.numerics.quantize import FP8, dequantize_weights, quantize_weights
from expertd.kernels.weights.checkpoint import Checkpoint, StoredTensor
from expertd.kernels.weights.digests import expert_digest, tensor_digest
from expertd.kernels.weights.reading import read_source, read_values
from expertd.kernels.weights.sources import SCALE_DTYPES, Source, expert_sources

log = logging.getLogger(__name__)
READERS = 4
"""Threads that read and quantise at once; a read releases the interpreter lock."""
HASHERS = 8
"""Threads that hash what was read, so that readers need not wait; a core hashes about as fast as a disk reads."""

STORED: Mapping[torch.dtype, torch.dtype] = {
    FP8: FP8,
    torch.bfloat16: torch.bfloat16,
    PACKED: torch.float4_e2m1fn_x2,
}
"""What files hold weights as -> what that is."""
INEXACT = (
    "layer %d: %d of %d weights are not exact in FP8 blocks: exponents of MXFP4 differ too much in theirs; they are off"
    " by at most 2^-18 of their block's largest"
)
OnBytes = Callable[[int], None]
OnDigest = Callable[[int, int, bytes], None]
"""Hears of layer, expert and the `expert_digest` of what was loaded; raises where that must not be used."""


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """One expert's weights as plain numbers, FP32."""

    up: Tensor
    """[I, H]."""
    gate: Tensor
    """[I, H]."""
    down: Tensor
    """[H, I]."""
    swiglu_limit: float | None = None
    """The bound on what goes into SwiGLU."""


def layer_bytes(checkpoint: Checkpoint, layer: int, experts: Sequence[int], dtype: torch.dtype = FP8) -> int:
    """Bytes that `load_layer` will read. Checks that every tensor is there, with the right shape and dtype."""
    return sum(stored.num_bytes for expert in experts for stored in expert_tensors(checkpoint, layer, expert, dtype))


def stored_dtypes(checkpoint: Checkpoint, experts: Mapping[int, Sequence[int]]) -> tuple[torch.dtype, ...]:
    """What the files hold the weights of these experts, by layer, as: float8_e4m3fn, bfloat16, float4_e2m1fn_x2 for
    MXFP4, or several of these.

    Raises `CheckpointError`.
    """
    found = {
        source.stored
        for layer, chosen in experts.items()
        for expert in chosen
        for source in expert_sources(checkpoint, layer, expert)
    }
    return tuple(dtype for stored, dtype in STORED.items() if stored in found)


def expert_tensors(
    checkpoint: Checkpoint, layer: int, expert: int, dtype: torch.dtype = FP8
) -> tuple[StoredTensor, ...]:
    """An expert's tensors in the order of its digest, checked for shape and whether they can be served as `dtype`.

    Raises `CheckpointError`.
    """
    return tuple(stored for source in expert_sources(checkpoint, layer, expert, dtype) for stored in source.tensors)


def load_layer(
    checkpoint: Checkpoint,
    layer: int,
    experts: Sequence[int],
    on_bytes: OnBytes,
    on_digest: OnDigest | None = None,
    dtype: torch.dtype = FP8,
) -> LayerWeights:
    """Read the experts of one layer as `dtype`; for float8_e4m3fn BF16 weights are quantised, and MXFP4 ones converted:
    the log tells how many are not exact. `on_bytes` hears of every
    tensor read, `on_digest` of every expert; without it nothing is hashed.

    Raises `CheckpointError` for tensors that are missing, truncated, of another shape or dtype, badly scaled or all
    zero, and what `on_digest` raises.
    """
    config = checkpoint.config
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    weights = LayerWeights(
        up_gate=torch.empty(len(experts), 2 * inner, hidden, dtype=dtype, device="cpu"),
        up_gate_scales=torch.ones(len(experts), 2 * inner // BLOCK, hidden // BLOCK, dtype=torch.float32, device="cpu"),
        down=torch.empty(len(experts), hidden, inner, dtype=dtype, device="cpu"),
        down_scales=torch.ones(len(experts), hidden // BLOCK, inner // BLOCK, dtype=torch.float32, device="cpu"),
        swiglu_limit=config.swiglu_limit,
    )

    inexact: list[int] = []

    def load_expert(local: int) -> list[Future[bytes]]:
        """The digests of the expert's tensors."""
        hashing = []
        up, gate = weights.up_gate[local].chunk(2)
        up_scales, gate_scales = weights.up_gate_scales[local].chunk(2)
        targets = {
            "up_proj": (up, up_scales),
            "gate_proj": (gate, gate_scales),
            "down_proj": (weights.down[local], weights.down_scales[local]),
        }
        for source in expert_sources(checkpoint, layer, experts[local], dtype):
            chosen = [targets[projection] for projection in source.projections]
            contents = read_source(checkpoint, source, chosen, inexact.append)
            if on_digest is not None:
                hashing += [hashers.submit(tensor_digest, *read) for read in zip(source.tensors, contents, strict=True)]
            on_bytes(sum(stored.num_bytes for stored in source.tensors))
        return hashing

    with (
        ThreadPoolExecutor(HASHERS, thread_name_prefix="digests") as hashers,
        ThreadPoolExecutor(READERS, thread_name_prefix="weights") as readers,
    ):
        for expert, hashing in zip(experts, readers.map(load_expert, range(len(experts))), strict=True):
            if on_digest is not None:
                on_digest(layer, expert, expert_digest(digest.result() for digest in hashing))
    if inexact:
        log.warning(INEXACT, layer, sum(inexact), weights.up_gate.numel() + weights.down.numel())
    return weights


def read_expert(checkpoint: Checkpoint, layer: int, expert: int, dtype: torch.dtype = FP8) -> ExpertMatrices:
    """The values that a server of `dtype` holds for an expert: to FP8 blocks BF16 and MXFP4 weights are rounded.

    Shares nothing with `load_layer` but where things are, so that one may check the other. Raises `CheckpointError`.
    """
    matrices: dict[str, Tensor] = {}
    for source in expert_sources(checkpoint, layer, expert, dtype):
        for projection, matrix in read_values(checkpoint, source).items():
            rounding = _rounding(source, dtype)
            matrices[projection] = matrix if rounding is None else dequantize_weights(*rounding(matrix))
    return ExpertMatrices(
        matrices["up_proj"], matrices["gate_proj"], matrices["down_proj"], checkpoint.config.swiglu_limit
    )


def _rounding(source: Source, dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """What makes FP8 blocks of the values of a matrix that is not stored so; None where it is served as it is."""
    if source.packed:
        return round_to_blocks
    return quantize_weights if dtype == FP8 and source.scales is None else None


def read_matrix(checkpoint: Checkpoint, name: str, rows: int, columns: int) -> Tensor:
    """A weight [rows, columns] as float32, dequantised when it is stored in FP8. Raises `CheckpointError`."""
    weight = checkpoint.read(name, (rows, columns), FP8, torch.bfloat16, torch.float32)
    if weight.dtype != FP8:
        return weight.float()
    blocks = (rows // BLOCK, columns // BLOCK)
    scales = checkpoint.read(checkpoint.config.family.scales_of(name), blocks, *SCALE_DTYPES)
    return dequantize_weights(weight, scales.float())
