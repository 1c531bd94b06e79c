"""Families of models: how each spells its configuration and names the tensors of its experts on Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture. The defaults are DeepSeek-V3's, under whose names expertd knows everything."""

    source: str
    """transformers' class, or the document, that the names and the routing are taken from."""
    published: str
    """Models of it, for people."""
    scoring_func: str = "sigmoid"
    """What turns router logits into scores: sigmoid, sqrtsoftplus, or softmax over all experts."""
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field -> its names in config.json, the usual one first, where it has others."""
    decided: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the architecture decides: config.json does not say them."""
    assumed: Mapping[str, Any] = field(default_factory=dict)
    """What fields are that config.json leaves out or says null of."""
    bounded: bool = False
    """Whether `swiglu_limit` bounds what goes into experts' SwiGLU: the gate from above, up on both sides."""
    nested: str | None = None
    """Where config.json keeps the fields of the model that reads text, when there is more to the model."""
    prefix: str = "model."
    """Before the layers in names of tensors."""
    module: str = "mlp"
    gate: str = "gate.weight"
    bias: str | None = "gate.e_score_correction_bias"
    """The correction bias within the module; None where there is none."""
    table: str | None = None
    """The experts of each token id within the module, in layers that choose by it and have no bias."""
    projections: Mapping[str, str] = field(default_factory=dict)
    """Projection -> its name in the checkpoint, where it has another."""
    scales: tuple[str, str] = ("", "_scale_inv")
    """How names of weights in FP8 or MXFP4 end, and instead those of their scales."""
    packed: bool = False
    """Whether experts may be stored in MXFP4 (`expertd.kernels.numerics.mxfp4`), with exponents named as scales are."""
    fused: bool = False
    """Whether a layer's experts may be in one tensor each of gate and up [E, 2I, H] and of down [E, H, I]: BF16
    checkpoints are published so, FP8 ones and those that transformers 5 writes expert by expert."""
    transposed: bool = False
    """Whether these are published as [E, H, 2I] and [E, I, H]; transformers 5 writes them as above, as shapes tell."""

    @property
    def has_correction_bias(self) -> bool:
        return self.bias is not None

    def spell(self, name: str) -> str:
        """What config.json calls field `name`."""
        return self.spellings.get(name, (name,))[0]

    def expert_weight(self, layer: int, expert: int, projection: str) -> str:
        """Name of the weight of `up_proj`, `gate_proj` or `down_proj` of an expert."""
        name = self.projections.get(projection, projection)
        return f"{self._module(layer)}.experts.{expert}.{name}.weight"

    def scales_of(self, weight: str) -> str:
        """Name of the scales of a tensor in FP8 or MXFP4."""
        ending, scales = self.scales
        return weight.removesuffix(ending) + scales

    def fused_weight(self, layer: int, name: str) -> str:
        """Name of the `gate_up_proj` or `down_proj` of all experts."""
        return f"{self._module(layer)}.experts.{name}"

    def gate_weight(self, layer: int) -> str:
        return f"{self._module(layer)}.{self.gate}"

    def correction_bias(self, layer: int) -> str:
        return f"{self._module(layer)}.{self.bias}"

    def expert_table(self, layer: int) -> str | None:
        """Name of the experts of each token id; None where no layer chooses so."""
        return None if self.table is None else f"{self._module(layer)}.{self.table}"

    def owns(self, name: str) -> bool:
        """Whether a tensor is one of an expert or of a gate."""
        inside = "|".join(re.escape(one) + "$" for one in (self.gate, self.bias, self.table) if one)
        experts = r"experts\.(\d+\.|gate_up_proj|down_proj)" if self.fused else r"experts\.\d+\."
        module = rf"{re.escape(self.prefix)}layers\.\d+\.{self.module}"
        return re.match(rf"{module}\.({experts}|gate\.|{inside})", name) is not None

    def _module(self, layer: int) -> str:
        return f"{self.prefix}layers.{layer}.{self.module}"


_UNGROUPED: Mapping[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
}
# transformers 5 writes the second name.
_NUM_EXPERTS = ("num_experts", "num_local_experts")
_MIXTRAL_PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_NESTED: Mapping[str, Any] = {"nested": "text_config", "prefix": "model.language_model."}
_QWEN3_5 = Family(
    source="Qwen3_5MoeSparseMoeBlock",
    published="the part of Qwen3.5 that reads text",
    scoring_func="softmax",
    spellings={"n_routed_experts": _NUM_EXPERTS},
    decided={**_UNGROUPED, "norm_topk_prob": True},
    bias=None,
    fused=True,
)

_V4 = Family(
    # Names, halves of bytes and the bound as in the inference code that DeepSeek publishes with the weights; the names
    # again in transformers' conversion_mapping.py.
    source="DeepseekV4SparseMoeBlock",
    published="DeepSeek-V4-Flash, V4-Pro",
    scoring_func="sqrtsoftplus",
    decided={"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
    bounded=True,
    prefix="",
    module="ffn",
    bias="gate.bias",
    table="gate.tid2eid",
    projections=_MIXTRAL_PROJECTIONS,
    scales=(".weight", ".scale"),
    packed=True,
)

FAMILIES: Mapping[str, Family] = {
    "deepseek_v3": Family(source="DeepseekV3MoE", published="DeepSeek-V3, R1, V3.1"),
    "deepseek_v32": Family(source="DeepseekV32MoE", published="DeepSeek-V3.2"),
    # Its config.json names DeepseekV3ForCausalLM as its architecture, and brings that model's code along.
    "kimi_k2": Family(source="DeepseekV3MoE", published="Kimi-K2-Instruct"),
    "deepseek_v4": _V4,
    # What its config.json leaves out is Flash's, as SGLang's configuration of the same name has it.
    "deepseek_ref": replace(
        _V4,
        published="DeepSeek-V4-Flash-FP8 by SGLang's project",
        assumed={"routed_scaling_factor": 1.5, "norm_topk_prob": True, "swiglu_limit": 10.0},
    ),
    "glm4_moe": Family(source="Glm4MoeMoE", published="GLM-4.5, GLM-4.5-Air, GLM-4.6"),
    "glm_moe_dsa": Family(source="GlmMoeDsaMoE", published="GLM-5"),
    "mimo_v2_flash": Family(
        source="MiMoV2FlashMoE",
        published="MiMo-V2-Flash",
        assumed={"routed_scaling_factor": 1.0, "first_k_dense_replace": 1},
    ),
    "hy_v3": Family(
        source="HYV3MoE",
        published="Hy3",
        spellings={"n_routed_experts": _NUM_EXPERTS, "routed_scaling_factor": ("router_scaling_factor",)},
        decided={"n_group": 1, "topk_group": 1, "norm_topk_prob": True},
        assumed={"first_k_dense_replace": 1},
        gate="router.gate.weight",
        bias="expert_bias",
    ),
    "minimax_m2": Family(
        source="MiniMaxM2SparseMoeBlock",
        published="MiniMax-M2, M2.5",
        spellings={
            "n_routed_experts": ("num_local_experts", "num_experts"),
            "moe_intermediate_size": ("intermediate_size",),
        },
        decided={**_UNGROUPED, "norm_topk_prob": True},
        module="block_sparse_moe",
        bias="e_score_correction_bias",
        projections=_MIXTRAL_PROJECTIONS,
    ),
    "ernie4_5_moe": Family(
        source="Ernie4_5_MoeSparseMoeBlock",
        published="ERNIE-4.5-21B-A3B, 300B-A47B",
        scoring_func="softmax",
        spellings={
            "n_routed_experts": ("moe_num_experts", *_NUM_EXPERTS),
            "num_experts_per_tok": ("moe_k", "num_experts_per_tok"),
        },
        decided={**_UNGROUPED, "norm_topk_prob": True},
        bias="moe_statics.e_score_correction_bias",
    ),
    "qwen3_moe": Family(
        source="Qwen3MoeSparseMoeBlock",
        published="Qwen3-30B-A3B, Qwen3-235B-A22B",
        scoring_func="softmax",
        spellings={"n_routed_experts": _NUM_EXPERTS},
        decided=_UNGROUPED,
        bias=None,
    ),
    "qwen3_next": Family(
        source="Qwen3NextSparseMoeBlock",
        published="Qwen3-Next-80B-A3B",
        scoring_func="softmax",
        spellings={"n_routed_experts": _NUM_EXPERTS},
        decided=_UNGROUPED,
        bias=None,
    ),
    # vLLM's qwen3_5.py reads fused tensors and single ones alike.
    "qwen3_5_moe": replace(_QWEN3_5, **_NESTED, published="Qwen3.5-397B-A17B, Qwen3.6-35B-A3B"),
    "qwen3_5_moe_text": _QWEN3_5,
    # That its fused tensors are transposed is in transformers' conversion_mapping.py and in vLLM's qwen3_vl_moe.py.
    "qwen3_vl_moe": replace(
        _QWEN3_5,
        **_NESTED,
        source="Qwen3VLMoeTextSparseMoeBlock",
        published="Qwen3-VL-30B-A3B, 235B-A22B",
        transposed=True,
    ),
    "mixtral": Family(
        source="MixtralSparseMoeBlock",
        published="Mixtral-8x7B, 8x22B",
        scoring_func="softmax",
        spellings={"n_routed_experts": ("num_local_experts",), "moe_intermediate_size": ("intermediate_size",)},
        decided={**_UNGROUPED, "norm_topk_prob": True},
        module="block_sparse_moe",
        bias=None,
        projections=_MIXTRAL_PROJECTIONS,
    ),
}
"""By `model_type` in config.json."""

KNOWN_UNSUPPORTED: Mapping[str, str] = {
    "gpt_oss": "has biases in its experts and a hidden_size of 2880, which is no multiple of 128; no conversion helps",
    "kimi_k25": "has INT4 weights of compressed-tensors and its sizes in a text_config; kimi_k2 in FP8 or BF16 is read",
}
"""Published families that are refused -> why, and what would work."""
