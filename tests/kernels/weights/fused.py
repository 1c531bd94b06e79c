"""One layer of Qwen3.5 (or, transposed, Qwen3-VL) in each layout of its experts, by hand."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from expertd.kernels.numerics.quantize import FP8, quantize_weights

EXPERTS, HIDDEN, INNER = 8, 256, 384
LAYOUTS = ("fused", "transposed")
Matrices = dict[str, Tensor]
"""up and gate [E, I, H], down [E, H, I], bfloat16."""
MODULE = "model.language_model.layers.0.mlp"


def fused_name(name: str) -> str:
    return f"{MODULE}.experts.{name}"


def random_experts(inner: int = INNER) -> Matrices:
    chance = torch.Generator().manual_seed(5)
    shapes = {"up": (inner, HIDDEN), "gate": (inner, HIDDEN), "down": (HIDDEN, inner)}
    return {name: torch.randn(EXPERTS, *shape, generator=chance).bfloat16() for name, shape in shapes.items()}


def experts_folder(folder: Path, matrices: Matrices, layout: str, stored: torch.dtype) -> Path:
    """Write a checkpoint: `layout` is "single", or one of `LAYOUTS`."""
    folder.mkdir(parents=True)
    tensors = {f"{MODULE}.gate.weight": torch.ones(EXPERTS, HIDDEN, dtype=torch.bfloat16)}
    if layout == "single":
        for name, matrix in matrices.items():
            for expert in range(EXPERTS):
                tensors |= _stored(fused_name(f"{expert}.{name}_proj.weight"), matrix[expert], stored)
    else:
        fused = {"gate_up_proj": torch.cat([matrices["gate"], matrices["up"]], dim=1), "down_proj": matrices["down"]}
        for name, matrix in fused.items():
            tensors |= _stored(fused_name(name), matrix.mT if layout == "transposed" else matrix, stored)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config(layout, matrices["down"].shape[-1])))
    return folder


def _stored(name: str, matrix: Tensor, stored: torch.dtype) -> dict[str, Tensor]:
    if stored != FP8:
        return {name: matrix}
    weight, scales = quantize_weights(matrix)
    return {name: weight, f"{name}_scale_inv": scales}


def _config(layout: str, inner: int) -> dict[str, object]:
    text = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": inner,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 1,
    }
    return {"model_type": "qwen3_vl_moe" if layout == "transposed" else "qwen3_5_moe", "text_config": text}
