"""The router of a layer: hidden states to expert ids and weights, for callers that give hidden states alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.kernels.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """A layer's gate: E experts, hidden size H."""

    weight: Tensor
    """[E, H] bfloat16 or float32."""
    correction_bias: Tensor
    """[E] float32: added to the scores for the choice of experts only; zeros where the model has none."""

    def __repr__(self) -> str:
        experts, width = self.weight.shape
        return f"Gate({experts} experts, hidden size {width})"


def load_gates(checkpoint: Checkpoint, layers: Iterable[int]) -> dict[int, Gate]:
    """Read the gates of `layers`. Raises `CheckpointError`."""
    family = checkpoint.config.family
    experts, width = checkpoint.config.n_routed_experts, checkpoint.config.hidden_size

    def bias(layer: int) -> Tensor:
        if not family.has_correction_bias:
            return torch.zeros(experts)
        name = family.correction_bias(layer)
        # ERNIE's is a matrix of one row.
        shape = (1, experts) if len(checkpoint.find(name).shape) == 2 else (experts,)
        return checkpoint.read(name, shape, torch.float32, torch.bfloat16).float().flatten()

    return {
        layer: Gate(
            weight=checkpoint.read(family.gate_weight(layer), (experts, width), torch.bfloat16, torch.float32),
            correction_bias=bias(layer),
        )
        for layer in layers
    }
