"""LoRA adapters of the tiny models, and what transformers finds of tokens that were chosen with one."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

ATTENTION = ("q_proj", "v_proj", "o_proj")
RANK = 8
SIZE = 0.3
"""Of its numbers: enough to change what follows any prompt."""


def write_adapter(folder: Path, model: Path, *targets: str) -> Path:
    """Random weights for the named modules of every layer of `model`, in the files of PEFT, under `folder`."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, weight in _targeted(model, targets).items():
        rows, columns = weight.shape
        for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            key = f"base_model.model.{name}.lora_{part}.weight"
            tensors[key] = torch.randn(shape, generator=generator) * SIZE
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def below_best(model: Path, prompt: list[int], chosen: list[int], adapter: Path | None = None) -> Tensor:
    """How far each chosen token's logit is below the best, [tokens], with `adapter` added to the weights, in FP32."""
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    added = load_file(adapter / "adapter_model.safetensors") if adapter else {}
    for name, weight in whole.named_parameters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in added:
            weight.data += added[f"{stem}.lora_B.weight"] @ added[f"{stem}.lora_A.weight"]
    with torch.no_grad():
        logits: Tensor = whole(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1]
    return logits.amax(-1) - logits.gather(-1, torch.tensor(chosen)[:, None])[:, 0]


def for_expert(adapter: Path, expert: int) -> None:
    """Have what `adapter` has for queries be for an expert's gate projection."""
    tensors, renamed = adapter / "adapter_model.safetensors", ("self_attn.q_proj", f"mlp.experts.{expert}.gate_proj")
    save_file({name.replace(*renamed): tensor for name, tensor in load_file(tensors).items()}, tensors)


def _targeted(model: Path, targets: tuple[str, ...]) -> dict[str, Tensor]:
    whole = AutoModelForCausalLM.from_pretrained(model)
    return {
        name.removesuffix(".weight"): weight
        for name, weight in whole.named_parameters()
        if name.split(".")[-2] in targets
    }
