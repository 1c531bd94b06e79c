"""The router of a layer: hidden states to expert ids and weights, for callers that give hidden states alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """A layer's gate: E experts, hidden size H."""

    weight: Tensor
    """[E, H] bfloat16 or float32."""
    correction_bias: Tensor
    """[E] float32: added to the scores for the choice of experts only; zeros where the model has none."""
    table: Tensor | None = None
    """[V, k] int32: the experts of each token id, in a layer that chooses by it and not by hidden states."""

    def __repr__(self) -> str:
        experts, width = self.weight.shape
        return f"Gate({experts} experts, hidden size {width})"


def load_gates(checkpoint: Checkpoint, layers: Iterable[int]) -> dict[int, Gate]:
    """Read the gates of `layers`. Raises `CheckpointError`."""
    config = checkpoint.config
    family, experts, width = config.family, config.n_routed_experts, config.hidden_size

    def bias(layer: int) -> Tensor:
        name = family.correction_bias(layer)
        # ERNIE's is a matrix of one row.
        shape = (1, experts) if len(checkpoint.find(name).shape) == 2 else (experts,)
        return checkpoint.read(name, shape, torch.float32, torch.bfloat16).float().flatten()

    def gate(layer: int) -> Gate:
        name = family.expert_table(layer)
        table = None if name is None or name not in checkpoint else _read_table(checkpoint, name)
        return Gate(
            weight=checkpoint.read(family.gate_weight(layer), (experts, width), torch.bfloat16, torch.float32),
            correction_bias=bias(layer)
            if family.has_correction_bias and table is None
            else torch.zeros(experts, dtype=torch.float32, device="cpu"),
            table=table,
        )

    return {layer: gate(layer) for layer in layers}


def _read_table(checkpoint: Checkpoint, name: str) -> Tensor:
    """[V, k] int32, of the model's experts."""
    config, stored = checkpoint.config, checkpoint.find(name)
    shape = (*stored.shape[:1], config.num_experts_per_tok)
    table = checkpoint.read(name, shape, torch.int64, torch.int32)
    low, high = (int(one) for one in table.aminmax())
    if low < 0 or high >= config.n_routed_experts:
        raise CheckpointError(
            f"{stored.file}: tensor {name}: expected experts 0 to {config.n_routed_experts - 1}, found {low} to {high}"
        )
    return table.int()
