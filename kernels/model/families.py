"""Families of models: how each spells its configuration and names the tensors of its experts on Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture. The defaults are DeepSeek-V3's, under whose names expertd knows everything."""

    scoring_func: str = "sigmoid"
    """What turns router logits into scores: sigmoid, or softmax over all experts."""
    has_correction_bias: bool = True
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field -> its names in config.json, the usual one first, where it has others."""
    decided: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the architecture decides: config.json does not say them."""
    module: str = "mlp"
    projections: Mapping[str, str] = field(default_factory=dict)
    """Projection -> its name in the checkpoint, where it has another."""

    def spell(self, name: str) -> str:
        """What config.json calls field `name`."""
        return self.spellings.get(name, (name,))[0]

    def expert_weight(self, layer: int, expert: int, projection: str) -> str:
        """Name of the weight of `up_proj`, `gate_proj` or `down_proj` of an expert."""
        name = self.projections.get(projection, projection)
        return f"model.layers.{layer}.{self.module}.experts.{expert}.{name}.weight"

    def gate_weight(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.module}.gate.weight"

    def correction_bias(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.module}.gate.e_score_correction_bias"


_UNGROUPED: Mapping[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
}

FAMILIES: Mapping[str, Family] = {
    "deepseek_v3": Family(),
    "glm4_moe": Family(),
    "qwen3_moe": Family(
        scoring_func="softmax",
        has_correction_bias=False,
        # transformers 5 writes the second name.
        spellings={"n_routed_experts": ("num_experts", "num_local_experts")},
        decided=_UNGROUPED,
    ),
    "mixtral": Family(
        scoring_func="softmax",
        has_correction_bias=False,
        spellings={"n_routed_experts": ("num_local_experts",), "moe_intermediate_size": ("intermediate_size",)},
        decided={**_UNGROUPED, "norm_topk_prob": True},
        module="block_sparse_moe",
        projections={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    ),
}
"""By `model_type` in config.json."""
