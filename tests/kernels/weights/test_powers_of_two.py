"""Scales that are nothing but exponents (UE8M0), against weights that are decoded by hand in FP64."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import silu

from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import FP8
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.torch.backend import TorchBackend
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.experts import load_layer, read_expert
from tests.kernels.weights.fused import EXPERTS, HIDDEN, INNER, experts_folder, fused_name, random_experts
from tests.support.serving import random_batch

LAYOUTS = ("single", "fused", "transposed")
NAMES = ("up", "gate", "down")
Doubles = npt.NDArray[np.float64]


def power_folder(folder: Path, layout: str, low: int, high: int) -> Path:
    """A checkpoint in FP8 with scales of random bytes from `low` to `high`, each a power of two."""
    experts_folder(folder, random_experts(), layout, FP8)
    tensors = load_file(folder / "model.safetensors")
    chance = torch.Generator().manual_seed(9)
    for name, scales in tensors.items():
        if name.endswith("_scale_inv"):
            exponents = torch.randint(low, high + 1, scales.shape, dtype=torch.uint8, generator=chance)
            exponents.view(-1)[:2] = torch.tensor([low, high], dtype=torch.uint8)
            tensors[name] = exponents.view(torch.float8_e8m0fnu)
    save_file(tensors, folder / "model.safetensors")
    return folder


def decoded(folder: Path, layout: str, expert: int) -> dict[str, Doubles]:
    """The weights of an expert, from the bits of codes and scales (OCP's specifications of 8-bit formats)."""
    tensors = load_file(folder / "model.safetensors")

    def one(name: str, *index: int) -> Doubles:
        codes = tensors[name].view(torch.uint8).numpy()[index].astype(np.int64)
        exponent, mantissa = codes >> 3 & 15, codes & 7
        magnitude = np.where(exponent > 0, 2.0 ** (exponent - 7) * (1 + mantissa / 8), 2.0**-6 * mantissa / 8)
        scales = 2.0 ** (tensors[f"{name}_scale_inv"].view(torch.uint8).numpy()[index].astype(np.float64) - 127)
        signs = np.where(codes >> 7, -1.0, 1.0)
        values: Doubles = signs * magnitude * scales.repeat(128, axis=0).repeat(128, axis=1)
        return values

    if layout == "single":
        return {name: one(fused_name(f"{expert}.{name}_proj.weight")) for name in NAMES}
    both, down = (one(fused_name(name), expert) for name in ("gate_up_proj", "down_proj"))
    if layout == "transposed":
        both, down = both.T, down.T
    return {"gate": both[:INNER], "up": both[INNER:], "down": down}


def load(folder: Path) -> LayerWeights:
    with Checkpoint(folder) as checkpoint:
        return load_layer(checkpoint, 0, range(EXPERTS), lambda _: None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_is_the_code_times_the_power_exactly(layout: str, tmp_path: Path) -> None:
    # Of all these exponents the products with all codes are numbers of FP32.
    folder = power_folder(tmp_path / layout, layout, 10, 245)
    weights = load(folder)
    blocks = weights.up_gate_scales.repeat_interleave(128, dim=1).repeat_interleave(128, dim=2)
    served = weights.up_gate.double() * blocks.double()
    for expert in range(EXPERTS):
        wanted = decoded(folder, layout, expert)
        assert np.array_equal(served[expert].numpy(), np.concatenate([wanted["up"], wanted["gate"]]))
        with Checkpoint(folder) as checkpoint:
            matrices = read_expert(checkpoint, 0, expert)
        assert all(np.array_equal(getattr(matrices, name).double().numpy(), wanted[name]) for name in NAMES)


def test_all_powers_are_floats_to_the_last(tmp_path: Path) -> None:
    folder = power_folder(tmp_path / "fused", "fused", 0, 254)
    exponents = load_file(folder / "model.safetensors")[fused_name("down_proj_scale_inv")].view(torch.uint8)
    scales = load(folder).down_scales
    assert scales.dtype == torch.float32
    assert {exponents.min().item(), exponents.max().item()} == {0, 254}
    assert torch.equal(scales.double(), 2.0 ** (exponents.double() - 127))


def test_a_layer_is_computed_with_them(tmp_path: Path) -> None:
    folder = power_folder(tmp_path / "single", "single", 116, 120)
    backend = TorchBackend()
    backend.load_layer(0, load(folder))
    batch = random_batch(40, HIDDEN, EXPERTS, 2, seed=3)
    batch = replace(batch, hidden=torch.randn(40, HIDDEN).bfloat16(), scales=None)
    assert relative_error(backend.execute(0, batch).sums, by_hand(folder, batch)) < 1e-6


def by_hand(folder: Path, batch: TokenBatch) -> Tensor:
    """[T, H] float64."""
    sums = torch.zeros(batch.hidden.shape, dtype=torch.float64)
    for expert in range(EXPERTS):
        up, gate, down = (torch.from_numpy(decoded(folder, "single", expert)[name]) for name in NAMES)
        shares = torch.where(batch.expert_ids == expert, batch.weights, 0).sum(dim=1, keepdim=True)
        hidden = batch.hidden.double()
        sums += shares.double() * ((silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T)
    return sums


def test_the_exponent_that_means_no_number_is_refused(tmp_path: Path) -> None:
    folder = power_folder(tmp_path / "fused", "fused", 255, 255)
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scale_inv\[\d\]: expected finite scales >= 0, found nan"):
        load(folder)
