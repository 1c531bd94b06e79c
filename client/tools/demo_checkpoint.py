"""A small seeded checkpoint in DeepSeek-V3's own format, for the demo and for tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertd.kernels.numerics.quantize import quantize_weights
from expertd.kernels.weights.checkpoint import INDEX

FORMAT = 1
"""Part of the cached folder's name: raise it when the content changes."""


@dataclass(frozen=True, slots=True)
class DemoModel:
    """Sizes of the checkpoint; the defaults keep DeepSeek-V3's 256 experts, 8 groups, top 4 groups and top 8."""

    hidden_size: int = 512
    moe_intermediate_size: int = 256
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    moe_layers: int = 2
    quantized: bool = True
    """FP8 with `weight_scale_inv`, as DeepSeek publishes; else BF16."""
    seed: int = 0

    @property
    def name(self) -> str:
        kind = "fp8" if self.quantized else "bf16"
        return (
            f"v{FORMAT}-h{self.hidden_size}-i{self.moe_intermediate_size}-e{self.n_routed_experts}"
            f"-k{self.num_experts_per_tok}-g{self.n_group}-{self.topk_group}-l{self.moe_layers}-{kind}-s{self.seed}"
        )

    @property
    def hf_config(self) -> dict[str, Any]:
        """The content of config.json: layer 0 is dense, the others are Mixtures of Experts."""
        config: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_size": self.hidden_size,
            "intermediate_size": 2 * self.hidden_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_hidden_layers": self.moe_layers + 1,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "n_routed_experts": self.n_routed_experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": self.num_experts_per_tok,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "hidden_act": "silu",
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 128,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 128,
            "v_head_dim": 64,
            "vocab_size": 1024,
            "max_position_embeddings": 4096,
            "num_nextn_predict_layers": 0,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        if self.quantized:
            config["quantization_config"] = {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            }
        return config


def write_demo_checkpoint(folder: Path, model: DemoModel, on_layer: Callable[[int], None] = lambda layer: None) -> Path:
    """The checkpoint of `model` in a folder of `folder` that is named after its sizes; see `write_checkpoint`."""
    return write_checkpoint(folder / model.name, model, on_layer)


def write_checkpoint(final: Path, model: DemoModel, on_layer: Callable[[int], None] = lambda layer: None) -> Path:
    """The folder `final` with the checkpoint of `model`, written unless there is already such a folder.

    It appears complete or not at all, also when several processes write it at once. `on_layer` hears of each layer.
    """
    from safetensors.torch import save_file

    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.parent / f".{final.name}.{torch.randint(1 << 62, ()).item()}.part"
    partial.mkdir()
    try:
        weight_map: dict[str, str] = {}
        total = 0
        for layer in range(model.moe_layers + 1):
            tensors = dict(_layer_tensors(model, layer))
            file = f"model-{layer + 1:05d}-of-{model.moe_layers + 1:05d}.safetensors"
            save_file(tensors, partial / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            on_layer(layer)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (partial / INDEX).write_text(json.dumps(index, indent=2))
        (partial / "config.json").write_text(json.dumps(model.hf_config, indent=2))
        _move_into_place(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _move_into_place(partial: Path, final: Path) -> None:
    try:
        partial.rename(final)
    except OSError:
        # Another process finished first; its seed gave it the same bytes.
        if not final.exists():
            raise


def _layer_tensors(model: DemoModel, layer: int) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a layer; the embeddings, final norm and head travel with layer 0."""
    config = model.hf_config
    generator = torch.Generator().manual_seed(model.seed * 1000 + layer)
    hidden, inner = model.hidden_size, model.moe_intermediate_size
    prefix = f"model.layers.{layer}"

    def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, Tensor]]:
        weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
        if not model.quantized:
            yield f"{name}.weight", weight.to(torch.bfloat16)
            return
        stored, scales = quantize_weights(weight)
        yield f"{name}.weight", stored
        yield f"{name}.weight_scale_inv", scales

    def mlp(name: str, width: int) -> Iterator[tuple[str, Tensor]]:
        yield from linear(f"{name}.gate_proj", width, hidden)
        yield from linear(f"{name}.up_proj", width, hidden)
        yield from linear(f"{name}.down_proj", hidden, width)

    def norm(name: str, width: int) -> tuple[str, Tensor]:
        return f"{name}.weight", torch.ones(width, dtype=torch.bfloat16)

    def embedding(name: str) -> tuple[str, Tensor]:
        values = torch.randn(config["vocab_size"], hidden, generator=generator)
        return f"{name}.weight", (values * hidden**-0.5).to(torch.bfloat16)

    if layer == 0:
        yield embedding("model.embed_tokens")
        yield norm("model.norm", hidden)
        yield embedding("lm_head")
        yield from mlp(f"{prefix}.mlp", config["intermediate_size"])
    else:
        for expert in range(model.n_routed_experts):
            yield from mlp(f"{prefix}.mlp.experts.{expert}", inner)
        yield from mlp(f"{prefix}.mlp.shared_experts", inner)
        gate = torch.randn(model.n_routed_experts, hidden, generator=generator) * hidden**-0.5
        yield f"{prefix}.mlp.gate.weight", gate.to(torch.bfloat16)
        yield (
            f"{prefix}.mlp.gate.e_score_correction_bias",
            torch.randn(model.n_routed_experts, generator=generator) * 0.02,
        )
    heads, rope, nope = config["num_attention_heads"], config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    q_rank, kv_rank, value = config["q_lora_rank"], config["kv_lora_rank"], config["v_head_dim"]
    attention = f"{prefix}.self_attn"
    yield from linear(f"{attention}.q_a_proj", q_rank, hidden)
    yield norm(f"{attention}.q_a_layernorm", q_rank)
    yield from linear(f"{attention}.q_b_proj", heads * (nope + rope), q_rank)
    yield from linear(f"{attention}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
    yield norm(f"{attention}.kv_a_layernorm", kv_rank)
    yield from linear(f"{attention}.kv_b_proj", heads * (nope + value), kv_rank)
    yield from linear(f"{attention}.o_proj", hidden, heads * value)
    yield norm(f"{prefix}.input_layernorm", hidden)
    yield norm(f"{prefix}.post_attention_layernorm", hidden)
