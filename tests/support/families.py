"""Small seeded models: DeepSeek-V3's, and other families' by transformers, with their experts in FP8 blocks beside."""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    DeepseekV4Config,
    DeepseekV32Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GlmMoeDsaConfig,
    HYV3Config,
    MiMoV2FlashConfig,
    MiniMaxM2Config,
    MixtralConfig,
    Qwen3_5MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLMoeConfig,
)

from expertd.client.tools.demo_checkpoint import DemoModel
from expertd.kernels.model.families import FAMILIES
from expertd.kernels.numerics.mxfp4 import EXPONENTS, GROUP, decode
from expertd.kernels.numerics.quantize import dequantize_weights, quantize_weights

SMALL = DemoModel(
    hidden_size=256, moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2
)
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "vocab_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    # Large enough for experts to matter and for logits to be decided.
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "glm4_moe": Glm4MoeConfig(
        **SIZES,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
        first_k_dense_replace=1,
        use_qk_norm=True,
    ),
    "mixtral": MixtralConfig(**SIZES, intermediate_size=128, num_local_experts=16, num_experts_per_tok=2),
}
"""Families that all tests of the plug-in's take."""
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 128, "num_experts_per_tok": 4}
_GROUPED: dict[str, Any] = {
    **SIZES,
    **_EXPERTS,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
_LINEAR: dict[str, Any] = {
    **SIZES,
    **_EXPERTS,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_experts": 16,
    "shared_expert_intermediate_size": 128,
}
_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 256,
    "deepstack_visual_indexes": [],
    "num_position_embeddings": 16,
}
_V4 = DeepseekV4Config(
    **SIZES | _EXPERTS | {"num_key_value_heads": 1},
    n_routed_experts=16,
    mlp_layer_types=["hash_moe", "moe", "moe"],
    q_lora_rank=64,
    o_lora_rank=64,
    o_groups=2,
    index_n_heads=2,
    index_head_dim=32,
    # Below what many gates and ups are.
    swiglu_limit=0.5,
)
SERVED: dict[str, Any] = {
    "deepseek_v4": _V4,
    "deepseek_ref": _V4,
    "deepseek_v32": DeepseekV32Config(**_GROUPED),
    # transformers has DeepSeek-V3's classes for it.
    "kimi_k2": DeepseekV3Config(
        **_GROUPED | {"head_dim": 32, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}
    ),
    "glm_moe_dsa": GlmMoeDsaConfig(**_GROUPED | {"n_group": 1, "topk_group": 1}),
    "mimo_v2_flash": MiMoV2FlashConfig(
        **SIZES, **_EXPERTS, intermediate_size=256, n_routed_experts=16, routed_scaling_factor=None
    ),
    "hy_v3": HYV3Config(**SIZES, **_EXPERTS, intermediate_size=256, num_experts=16),
    "minimax_m2": MiniMaxM2Config(**SIZES, intermediate_size=128, num_local_experts=16, num_experts_per_tok=4),
    "ernie4_5_moe": Ernie4_5_MoeConfig(
        **SIZES, moe_intermediate_size=128, moe_k=4, intermediate_size=256, moe_num_experts=16
    ),
    "qwen3_next": Qwen3NextConfig(**_LINEAR, intermediate_size=256),
    "qwen3_5_moe": Qwen3_5MoeConfig(text_config=_LINEAR, vision_config=_VISION),
    "qwen3_5_moe_text": Qwen3_5MoeTextConfig(**_LINEAR),
    "qwen3_vl_moe": Qwen3VLMoeConfig(
        text_config={**SIZES, **_EXPERTS, "intermediate_size": 256, "num_experts": 16}, vision_config=_VISION
    ),
}
"""All others beside DeepSeek-V3: layers are compared, and whole models."""


@dataclass(frozen=True)
class FamilyFolders:
    """One model three times; the experts of the last two have equal values."""

    plain: Path
    """BF16, as transformers saves it."""
    quantized: Path
    """Experts in FP8 with `weight_scale_inv`, all else BF16: what servers read."""
    floats: Path
    """FP32."""


def write_family(folder: Path, model_type: str) -> FamilyFolders:
    """Write the model of `CONFIGS` or `SERVED` under `folder`."""
    torch.manual_seed(11)
    config = copy.deepcopy((CONFIGS | SERVED)[model_type])
    model = auto_model(config).from_config(config).to(torch.bfloat16)
    for name, bias in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith("e_score_correction_bias"):
            bias.data.normal_(std=0.05)
        if name.endswith("tid2eid"):
            bias.data.copy_(torch.rand(len(bias), 16).argsort(dim=1)[:, : bias.shape[1]])
    folders = FamilyFolders(folder / "plain", folder / "quantized", folder / "floats")
    model.save_pretrained(folders.plain)
    family, quantized, floats = FAMILIES[model_type], {}, {}
    for name, weight in load_file(folders.plain / "model.safetensors").items():
        # DeepSeek-V4's are published without.
        published = name if family.prefix else name.removeprefix("model.")
        if ".experts." not in name:
            quantized[published], floats[name] = weight, weight.float() if weight.is_floating_point() else weight
            continue
        stored, scales = quantize_weights(weight)
        quantized |= {published: stored, family.scales_of(published): scales}
        floats[name] = dequantize_weights(stored, scales)
    saved = json.loads((folders.plain / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    _save(folders.quantized, quantized, saved | {"quantization_config": fp8, "model_type": model_type})
    _save(folders.floats, floats, saved | {"dtype": "float32"})
    return folders


def auto_model(config: Any) -> Any:  # noqa: ANN401
    """transformers' class that makes and loads a model of `config`."""
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def layers_of(model: Any) -> Any:  # noqa: ANN401
    """The layers of the model, or of the part that reads text."""
    return getattr(model.model, "language_model", model.model).layers


def routed(block: Any, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    """What a block of transformers adds for its routed experts, with their ids and weights, sorted by id."""
    bias = getattr(block, "e_score_correction_bias", None)
    if hasattr(block.gate, "tid2eid"):
        _, weights, ids = block.gate(hidden, tokens)
    else:
        _, weights, ids = block.gate(hidden) if bias is None else block.gate(hidden, bias)
    order = ids.argsort(dim=1)
    return block.experts(hidden, ids, weights), ids.gather(1, order), weights.gather(1, order)


def load_blocks(folder: Path) -> dict[int, Any]:
    """transformers' blocks of a checkpoint in FP32, by layer."""
    auto = auto_model(AutoConfig.from_pretrained(folder))
    model = auto.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    return {layer: one.mlp for layer, one in enumerate(layers_of(model)) if hasattr(one.mlp, "experts")}


def publish(folder: Path, model_type: str) -> None:
    """Rewrite what transformers wrote of a family with fused tensors as its BF16 models are published."""
    tensors = load_file(folder / "model.safetensors")
    fused = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
    for experts in {match[1] for name in fused if (match := re.match(r"(.*\.experts\.)\d+\.", name))}:
        gate, up, down = (
            torch.stack([fused.pop(f"{experts}{expert}.{name}_proj.weight") for expert in range(16)])
            for name in ("gate", "up", "down")
        )
        fused |= {f"{experts}gate_up_proj": torch.cat([gate, up], dim=1), f"{experts}down_proj": down}
    if model_type == "qwen3_vl_moe":
        fused = {name: weight.mT.contiguous() for name, weight in fused.items()}
    save_file(tensors | fused, folder / "model.safetensors", metadata={"format": "pt"})


def pack(folders: FamilyFolders, model_type: str) -> None:
    """Write other experts, in MXFP4, to `quantized`, and their values to `floats`."""
    chance = torch.Generator().manual_seed(4)
    quantized, floats = (load_file(folder / "model.safetensors") for folder in (folders.quantized, folders.floats))
    for name, weight in floats.items():
        if ".experts." in name:
            rows, columns = weight.shape
            packed = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, generator=chance)
            exponents = torch.randint(119, 124, (rows, columns // GROUP), dtype=torch.uint8, generator=chance)
            published = name.removeprefix("model.")
            quantized[published], floats[name] = packed, decode(packed, exponents.view(EXPONENTS))
            quantized[FAMILIES[model_type].scales_of(published)] = exponents.view(EXPONENTS)
    for folder, tensors in ((folders.quantized, quantized), (folders.floats, floats)):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
