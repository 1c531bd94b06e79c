"""Experts in slices of a layer's tensors: the same values as in tensors of their own, read without their neighbours."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertd.kernels.numerics.backend import LayerWeights
from expertd.kernels.numerics.quantize import FP8, quantize_weights
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.experts import load_layer, read_expert, stored_dtypes
from expertd.kernels.weights.manifest import Manifest
from expertd.kernels.weights.sample import sampled_fingerprint
from tests.kernels.weights.fused import EXPERTS, LAYOUTS, Matrices, experts_folder, fused_name, random_experts

CHOSEN = (5, 2)
GATE_UP, DOWN = fused_name("gate_up_proj"), fused_name("down_proj")


@pytest.fixture(scope="module")
def matrices() -> Matrices:
    return random_experts()


def load(folder: Path, dtype: torch.dtype = FP8) -> tuple[LayerWeights, list[tuple[int, int, bytes]]]:
    heard: list[tuple[int, int, bytes]] = []
    with Checkpoint(folder) as checkpoint:
        weights = load_layer(checkpoint, 0, CHOSEN, lambda _: None, lambda *digest: heard.append(digest), dtype)
    return weights, heard


def bits(weights: LayerWeights) -> list[Tensor]:
    tensors = (weights.up_gate, weights.up_gate_scales, weights.down, weights.down_scales)
    return [tensor.contiguous().view(torch.uint8) for tensor in tensors]


@pytest.mark.parametrize("stored", [torch.bfloat16, FP8], ids=["BF16", "FP8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_are_the_tensors_of_single_experts_bit_for_bit(
    layout: str, stored: torch.dtype, matrices: Matrices, tmp_path: Path
) -> None:
    single, fused = (experts_folder(tmp_path / name, matrices, name, stored) for name in ("single", layout))
    for dtype in (FP8, torch.bfloat16) if stored == torch.bfloat16 else (FP8,):
        expected, found = load(single, dtype)[0], load(fused, dtype)[0]
        assert all(map(torch.equal, bits(found), bits(expected)))
        with Checkpoint(single) as one, Checkpoint(fused) as other:
            assert stored_dtypes(other, {0: CHOSEN}) == (stored,)
            for expert in CHOSEN:
                values, wanted = read_expert(other, 0, expert, dtype), read_expert(one, 0, expert, dtype)
                assert all(torch.equal(getattr(values, name), getattr(wanted, name)) for name in ("up", "gate", "down"))


@pytest.mark.parametrize("inner", [128, 256, 384], ids=["2I = H", "I = H", "no square"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_those_that_were_written(layout: str, inner: int, tmp_path: Path) -> None:
    matrices = random_experts(inner)
    folder = experts_folder(tmp_path / layout, matrices, layout, torch.bfloat16)
    weights, _ = load(folder, torch.bfloat16)
    for local, expert in enumerate(CHOSEN):
        up, gate = weights.up_gate[local].chunk(2)
        assert torch.equal(up, matrices["up"][expert])
        assert torch.equal(gate, matrices["gate"][expert])
        assert torch.equal(weights.down[local], matrices["down"][expert])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_bytes_of_the_experts_asked_for_are_read(
    layout: str, matrices: Matrices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = experts_folder(tmp_path / layout, matrices, layout, torch.bfloat16)
    ranges: list[tuple[int, int]] = []
    preadv: Callable[..., int] = os.preadv

    def watched(descriptor: int, views: Any, offset: int) -> int:  # noqa: ANN401
        count = preadv(descriptor, views, offset)
        ranges.append((offset, count))
        return count

    with Checkpoint(folder) as checkpoint:
        entries = [checkpoint.find(name)[expert] for expert in CHOSEN for name in (GATE_UP, DOWN)]
        monkeypatch.setattr(os, "preadv", watched)
        load_layer(checkpoint, 0, CHOSEN, lambda _: None)
    assert sorted(ranges) == sorted((stored.start, stored.num_bytes) for stored in entries)


def test_an_entry_is_the_slice_that_safetensors_reads(matrices: Matrices, tmp_path: Path) -> None:
    folder = experts_folder(tmp_path / "fused", matrices, "fused", torch.bfloat16)
    with Checkpoint(folder) as checkpoint, safe_open(folder / "model.safetensors", framework="pt") as official:
        for name in (GATE_UP, DOWN):
            for expert in range(EXPERTS):
                assert torch.equal(checkpoint.load(checkpoint.find(name)[expert]), official.get_slice(name)[expert])
        with pytest.raises(IndexError, match=rf"has entries 0 to {EXPERTS - 1}, not {EXPERTS}"):
            checkpoint.find(DOWN)[EXPERTS]


def _transpose(tensors: dict[str, Tensor]) -> None:
    for name in (GATE_UP, DOWN):
        tensors[name] = tensors[name].mT.contiguous()


def _poison(value: float) -> Callable[[dict[str, Tensor]], None]:
    """The gate of one expert holds nothing else."""
    return lambda tensors: tensors[GATE_UP][2].chunk(2)[0].fill_(value)  # type: ignore[return-value]


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "transposed": (_transpose, r"gate_up_proj: expected shape \[8, 768, 256\], found \[8, 256, 768\]"),
    "an expert fewer": (
        lambda tensors: tensors.update({DOWN: tensors[DOWN][1:].contiguous()}),
        r"down_proj: expected shape \[8, 256, 384\], found \[7, 256, 384\]",
    ),
    "without gate and up": (lambda tensors: tensors.pop(GATE_UP), r"gate_up_proj is missing from the checkpoint"),
    "zeros": (_poison(0.0), r"gate_up_proj\[2\]: expected weights, found nothing but zeros"),
    "NaN": (_poison(float("nan")), r"gate_up_proj\[2\]: expected finite values, found NaN or Inf"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_wrong_with_a_slice_is_refused_with_its_name(change: str, matrices: Matrices, tmp_path: Path) -> None:
    folder = experts_folder(tmp_path / "fused", matrices, "fused", torch.bfloat16)
    spoil, message = REFUSED[change]
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("stored", [torch.bfloat16, FP8], ids=["BF16", "FP8"])
def test_every_expert_of_a_fused_tensor_counts_for_fingerprint_and_digests(
    stored: torch.dtype, matrices: Matrices, tmp_path: Path
) -> None:
    def told(values: Matrices, name: str) -> tuple[str, list[bytes]]:
        with Checkpoint(experts_folder(tmp_path / name / "fused", values, "fused", stored)) as checkpoint:
            manifest = Manifest.of(checkpoint, lambda _: None)
            return sampled_fingerprint(checkpoint), [manifest.digest(0, one) or b"" for one in range(EXPERTS)]

    fingerprint, digests = told(matrices, "as it was")
    assert told(matrices, "again") == (fingerprint, digests)
    assert [digest for _, _, digest in load(tmp_path / "again" / "fused")[1]] == [digests[one] for one in CHOSEN]
    for expert in range(EXPERTS):
        for name in ("up", "gate", "down"):
            changed = {one: tensor.clone() for one, tensor in matrices.items()}
            changed[name][expert] *= 1.5
            other, theirs = told(changed, f"{name} of {expert}")
            assert other != fingerprint
            assert [one for one in range(EXPERTS) if theirs[one] != digests[one]] == [expert]


def test_pages_of_a_fused_tensor_are_of_every_expert(matrices: Matrices, tmp_path: Path) -> None:
    """Without scales, which would tell of it, too: the codes of one expert's weight alone."""
    folder = experts_folder(tmp_path / "fused", matrices, "fused", FP8)
    with Checkpoint(folder) as checkpoint:
        before = sampled_fingerprint(checkpoint)
    tensors = load_file(folder / "model.safetensors")
    for expert in range(EXPERTS):
        changed = tensors[DOWN].clone()
        changed[expert] = quantize_weights(torch.ones(256, 384))[0]
        save_file(tensors | {DOWN: changed}, folder / "model.safetensors")
        with Checkpoint(folder) as checkpoint:
            assert sampled_fingerprint(checkpoint) != before
