"""What a checkpoint is, and how many GPUs of which size hold its experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from expertd.kernels.cutile.base.shape import MAX_EXPERTS, MAX_HIDDEN_SIZE, MAX_INTERMEDIATE_SIZE
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import expert_tensors
from expertd.server.doctor.finding import Finding, fail, ok
from expertd.server.doctor.host import WORKSPACE_BYTES

GPUS: Mapping[str, int] = MappingProxyType({"H100": 80_000_000_000, "H200": 141_000_000_000})
"""Bytes of memory of GPUs that serve."""
_FORMATS = {"F8_E4M3": "FP8 blocks", "BF16": "BF16", "I8": "MXFP4"}


def describe_model(checkpoint: Checkpoint, weights: str) -> Finding:
    """Family, format, size of an expert as it is stored and as it is served (`weights` "fp8" or "bf16"), and the GPUs
    that it takes.

    The format is that of the first expert. Raises `CheckpointError`.
    """
    model = checkpoint.config
    if not model.moe_layers:
        return fail("model", f"{model.model_type}: none of its {model.num_hidden_layers} layers has experts")
    stored = expert_tensors(checkpoint, model.moe_layers[0], 0)
    stored_bytes = sum(tensor.num_bytes for tensor in stored)
    # BF16 takes twice as many bytes as FP8, nearly.
    expert_bytes = model.expert_bytes * (2 if weights == "bf16" else 1)
    layers, experts = len(model.moe_layers), model.n_routed_experts
    return ok(
        "model",
        f"{model.model_type}, stored as {_FORMATS[stored[0].dtype]} of {stored_bytes / 1e6:.2f} MB an expert; {experts}"
        f" experts in each of {layers} layers, served as"
        f" {weights} with {expert_bytes / 1e6:.2f} MB each, {layers * experts * expert_bytes / 1e9:.1f} GB in all:"
        f" {_gpus(model, layers * expert_bytes)}",
    )


def _gpus(model: MoeConfig, one: int) -> str:
    """For people; `one` is the bytes of an expert of every layer."""
    for field, most in (("hidden_size", MAX_HIDDEN_SIZE), ("moe_intermediate_size", MAX_INTERMEDIATE_SIZE)):
        size = getattr(model, field)
        if size > most:
            name = model.family.spell(field)
            return f"on CPUs only, because its {name} is {size} and kernels for GPUs take up to {most}"
    counts = {name: gpus_needed(model.n_routed_experts, one, memory) for name, memory in GPUS.items()}
    sizes = [
        f"{count} {name} ({GPUS[name] // 1_000_000_000} GB)" if count else f"no {name} has room for one of every layer"
        for name, count in counts.items()
    ]
    return " or ".join(sizes)


def gpus_needed(experts: int, one: int, memory: int) -> int:
    """GPUs of `memory` bytes for whole experts, each of `one` bytes over all layers; 0 where not one fits."""
    most = min((memory - WORKSPACE_BYTES) // one, MAX_EXPERTS)
    return -(-experts // most) if most > 0 else 0
