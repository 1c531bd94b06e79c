"""Tiny models that have learnt a language of which every token follows from the one before, if their experts are right.

Random weights would not do: their largest logits are a rounding apart, and so are the tokens of any two ways to add.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.support.generation import write_tokenizer

WORDS, EXPERTS = 512, 16
STEPS, SEQUENCES, LENGTH = 120, 16, 32
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN3: dict[str, Any] = {"num_experts": EXPERTS, "num_key_value_heads": 2, "head_dim": 64, "norm_topk_prob": True}
FAMILIES: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SIZES, **QWEN3),
        {},
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **SIZES,
            first_k_dense_replace=1,
            num_key_value_heads=4,
            n_routed_experts=EXPERTS,
            n_group=4,
            topk_group=2,
            q_lora_rank=64,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
        ),
        # Published checkpoints say so; vLLM reads it.
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
}
"""Class, configuration, and what transformers leaves out of config.json."""


def following(shift: int = 1) -> Tensor:
    """The token after each, [WORDS]: all of them in one circle, `shift` steps along it."""
    circle = torch.randperm(WORDS, generator=torch.Generator().manual_seed(1))
    after = torch.empty_like(circle)
    after[circle] = circle.roll(-shift)
    return after


def continued(prompt: list[int], tokens: int) -> list[int]:
    """What follows a prompt."""
    after, told = following(), [prompt[-1]]
    for _ in range(tokens):
        told.append(int(after[told[-1]]))
    return told[1:]


def write_model(folder: Path, family: str) -> Path:
    """Teach a model of `family` and save it in BF16, with a tokenizer of words such as `w7`, under `folder`."""
    kind, config, left_out = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config)
    _teach(model)
    model.to(torch.bfloat16).save_pretrained(folder / family)
    written = folder / family / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | left_out))
    write_tokenizer(folder / family, [f"w{word}" for word in range(WORDS)])
    return folder / family


def _teach(model: Any) -> None:  # noqa: ANN401
    """With its experts the next token is the next of the circle; without them the seventh: nothing else knows."""
    silent = False
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_hook(lambda _module, _given, output: output * 0 if silent else output)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        silent = step % 2 == 1
        ids = torch.randint(0, WORDS, (SEQUENCES, LENGTH), generator=generator)
        wanted = following(7 if silent else 1)[ids]
        loss = functional.cross_entropy(model(ids).logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in model.modules():
        module._forward_hooks.clear()
