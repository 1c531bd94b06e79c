"""Where the matrices of an expert are stored: each in a tensor, or in a slice of one that holds a layer's experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.mxfp4 import EXPONENTS, GROUP, PACKED
from expertd.kernels.numerics.quantize import FP8
from expertd.kernels.weights.checkpoint import DTYPES, Checkpoint, CheckpointError, StoredTensor

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
"""What scales may be stored as: each value is one of float32's."""


@dataclass(frozen=True, slots=True)
class Source:
    """A stored matrix: of one projection, or of several whose rows follow each other."""

    projections: tuple[str, ...]
    """In the order of their rows, of which all have as many."""
    weight: StoredTensor
    scales: StoredTensor | None
    """None where the weight is BF16; where it is MXFP4, the exponents of its groups."""
    transposed: bool = False
    """Stored as columns x rows."""

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.weight,) if self.scales is None else (self.weight, self.scales)

    @property
    def packed(self) -> bool:
        """Whether it is MXFP4."""
        return self.stored == PACKED

    @property
    def stored(self) -> torch.dtype:
        return DTYPES[self.weight.dtype]

    @property
    def as_served(self) -> bool:
        """Whether the stored bytes are those of one projection, row by row."""
        return len(self.projections) == 1 and not self.transposed and not self.packed

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The [rows, columns] of each projection, views of a stored weight, or of its scales in blocks."""
        return (matrix.T if self.transposed else matrix).chunk(len(self.projections))


def expert_sources(checkpoint: Checkpoint, layer: int, expert: int, dtype: torch.dtype = FP8) -> tuple[Source, ...]:
    """An expert's matrices in the order of its digest, checked for shape and whether they can be served as `dtype`.

    Reads headers only. Raises `CheckpointError`.
    """
    config, family = checkpoint.config, checkpoint.config.family
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    if family.fused and family.fused_weight(layer, "down_proj") in checkpoint:
        return _slices(checkpoint, layer, expert, dtype)
    shapes = {"up_proj": (inner, hidden), "gate_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return tuple(
        Source((projection,), *_find(checkpoint, family.expert_weight(layer, expert, projection), shape, dtype))
        for projection, shape in shapes.items()
    )


def _slices(checkpoint: Checkpoint, layer: int, expert: int, dtype: torch.dtype) -> tuple[Source, ...]:
    """An expert's entries of the tensors of all experts: [E, rows, columns] or, transposed, [E, columns, rows]."""
    config, family = checkpoint.config, checkpoint.config.family
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    shapes = {
        family.fused_weight(layer, "gate_up_proj"): (2 * inner, hidden),
        family.fused_weight(layer, "down_proj"): (hidden, inner),
    }
    # Both are transposed or neither is; one of them may be a square, but not both.
    transposed = family.transposed and any(checkpoint.find(name).shape[1:] != shape for name, shape in shapes.items())
    sources = []
    for (name, shape), projections in zip(shapes.items(), (("gate_proj", "up_proj"), ("down_proj",)), strict=True):
        stored = (config.n_routed_experts, *(reversed(shape) if transposed else shape))
        weight, scales = _find(checkpoint, name, stored, dtype)
        sources.append(Source(projections, weight[expert], None if scales is None else scales[expert], transposed))
    return tuple(sources)


def _find(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[StoredTensor, StoredTensor | None]:
    """The stored weight [..., N, K], or [N, K/2] in MXFP4, to be served as `dtype`, and what scales it unless BF16."""
    family = checkpoint.config.family
    *lead, rows, columns = shape
    packed = family.packed and checkpoint.find(name).dtype == "I8"
    if packed:
        weight = checkpoint.check(name, (*lead, rows, columns // 2), PACKED)
    else:
        weight = checkpoint.check(name, shape, FP8, torch.bfloat16)
    if weight.dtype == "BF16":
        return weight, None
    if dtype != FP8:
        stored = "MXFP4, which is served as FP8" if packed else "FP8 already"
        raise CheckpointError(
            f"{weight.file}: tensor {name} is {stored}; --weights bf16 is for checkpoints of BF16: leave it out"
        )
    if packed:
        return weight, checkpoint.check(family.scales_of(name), (*lead, rows, columns // GROUP), EXPONENTS)
    blocks = (*lead, rows // BLOCK, columns // BLOCK)
    return weight, checkpoint.check(family.scales_of(name), blocks, *SCALE_DTYPES)
