"""Ways in which a served checkpoint can be wrong, each of which a verification must see."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from expertd.kernels.weights.checkpoint import Checkpoint, StoredTensor
from expertd.kernels.weights.ledger import Ledger
from expertd.kernels.weights.sample import _places

Tensors: TypeAlias = dict[tuple[int, str], Tensor]
"""(expert, `up_proj.weight` or `up_proj.weight_scale_inv` and so on) -> tensor, changed in place or replaced."""

DAMAGED, OTHER = 5, 9


def _gain(tensors: Tensors) -> None:
    tensors[DAMAGED, "down_proj.weight_scale_inv"] *= 1.05


def _sign(tensors: Tensors) -> None:
    weight = tensors[DAMAGED, "down_proj.weight"]
    weight.copy_((-weight.float()).to(weight.dtype))


def _zeros(tensors: Tensors) -> None:
    """But for one column: servers load no matrix of zeros alone."""
    tensors[DAMAGED, "down_proj.weight"][:, 1:].zero_()


def _swap_experts(tensors: Tensors) -> None:
    for (expert, name), tensor in list(tensors.items()):
        if expert == DAMAGED:
            tensors[DAMAGED, name], tensors[OTHER, name] = tensors[OTHER, name], tensor


def _swap_scales(projection: str) -> Callable[[Tensors], None]:
    """Swap the scales of the two blocks of a matrix that differ most by; a swap of equal ones changes nothing."""

    def swap(tensors: Tensors) -> None:
        scales = tensors[DAMAGED, f"{projection}.weight_scale_inv"].view(-1)
        least, most = int(scales.argmin()), int(scales.argmax())
        scales[[least, most]] = scales[[most, least]]

    return swap


MUTATIONS: Mapping[str, Callable[[Tensors], None]] = {
    "gain 1.05": _gain,
    "sign": _sign,
    "zeros": _zeros,
    "two experts swapped": _swap_experts,
    "scales of two up blocks swapped": _swap_scales("up_proj"),
    "scales of two gate blocks swapped": _swap_scales("gate_proj"),
    "scales of two down blocks swapped": _swap_scales("down_proj"),
}


def mutate_checkpoint(folder: Path, layer: int, mutation: Callable[[Tensors], None]) -> None:
    """Apply `mutation` to the FP8 experts of `layer`, in the files of `folder`."""
    with Checkpoint(folder) as checkpoint:
        stored = {
            (expert, name): checkpoint.find(f"model.layers.{layer}.mlp.experts.{expert}.{name}")
            for expert in (DAMAGED, OTHER)
            for projection in ("up_proj", "gate_proj", "down_proj")
            for name in (f"{projection}.weight", f"{projection}.weight_scale_inv")
        }
        tensors = {
            key: checkpoint.read(one.name, one.shape, torch.float8_e4m3fn, torch.float32) for key, one in stored.items()
        }
    mutation(tensors)
    for key, one in stored.items():
        with one.file.open("r+b") as file:
            file.seek(one.start)
            file.write(tensors[key].contiguous().view(torch.uint8).numpy().tobytes())


def age(folder: Path) -> None:
    """Give all files times of long ago: what is found of files that were just written is not recorded."""
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))


def rot(folder: Path, layer: int, mutation: Callable[[Tensors], None]) -> None:
    """Apply `mutation` behind the back of the file system, as a disk does, so that the recorded fingerprint stays."""
    age(folder)
    with Checkpoint(folder) as checkpoint:
        Ledger(checkpoint)
    mutate_checkpoint(folder, layer, mutation)
    age(folder)


def unsampled_place(stored: StoredTensor) -> int:
    """A byte of the tensor that no fingerprint is taken of."""
    sampled = {start + offset for start, size in _places(stored) for offset in range(size)}
    return next(place for place in range(stored.num_bytes) if place not in sampled)
