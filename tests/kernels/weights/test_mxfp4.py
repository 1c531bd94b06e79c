"""Checkpoints with experts in MXFP4, as DeepSeek-V4 stores them: loaded, refused, named and told of."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertd.kernels.numerics.mxfp4 import EXPONENTS, decode
from expertd.kernels.numerics.quantize import FP8, dequantize_weights
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.experts import layer_bytes, load_layer, read_expert, stored_dtypes
from expertd.kernels.weights.ledger import Ledger
from expertd.kernels.weights.manifest import Manifest
from expertd.kernels.weights.sample import sampled_fingerprint

HIDDEN, INNER, EXPERTS = 256, 128, 4
SHAPES = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
CONFIG = {
    "model_type": "deepseek_v4",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INNER,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_hash_layers": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "expert_dtype": "fp4",
    "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
}
Tensors = dict[str, Tensor]


def name_of(expert: int, projection: str, ending: str = "weight") -> str:
    return f"layers.0.ffn.experts.{expert}.{projection}.{ending}"


def tensors_of(low: int = 110, high: int = 122) -> Tensors:
    """All experts and the gate, with exponents from `low` to `high`."""
    chance = torch.Generator().manual_seed(7)
    tensors: Tensors = {
        "layers.0.ffn.gate.weight": torch.ones(EXPERTS, HIDDEN).bfloat16(),
        "layers.0.ffn.gate.tid2eid": torch.tensor([[0, 1], [3, 2], [1, 3]]),
    }
    for expert in range(EXPERTS):
        for projection, (rows, columns) in SHAPES.items():
            packed = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8, generator=chance)
            exponents = torch.randint(low, high + 1, (rows, columns // 32), dtype=torch.uint8, generator=chance)
            tensors[name_of(expert, projection)] = packed
            tensors[name_of(expert, projection, "scale")] = exponents.view(EXPONENTS)
    return tensors


def write(folder: Path, tensors: Tensors, **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    return folder


def stored_values(tensors: Tensors, expert: int, projection: str) -> Tensor:
    return decode(tensors[name_of(expert, projection)], tensors[name_of(expert, projection, "scale")])


def test_a_layer_is_loaded_exactly_with_its_bytes_digests_and_bound(tmp_path: Path) -> None:
    tensors = tensors_of()
    seen: list[int] = []
    digests: dict[int, bytes] = {}
    with Checkpoint(write(tmp_path, tensors)) as checkpoint:
        manifest = Manifest.of(checkpoint, lambda _: None)
        weights = load_layer(
            checkpoint, 0, range(EXPERTS), seen.append, lambda layer, expert, found: digests.update({expert: found})
        )
        assert sum(seen) == layer_bytes(checkpoint, 0, range(EXPERTS)) == EXPERTS * 3 * HIDDEN * INNER * 17 // 32
        assert stored_dtypes(checkpoint, {0: range(EXPERTS)}) == (torch.float4_e2m1fn_x2,)
        assert all(digests[expert] == manifest.digest(0, expert) for expert in range(EXPERTS))
        read = [read_expert(checkpoint, 0, expert) for expert in range(EXPERTS)]
    assert (weights.dtype, weights.swiglu_limit, read[0].swiglu_limit) == (FP8, 10.0, 10.0)
    for expert, matrices in enumerate(read):
        up, gate = dequantize_weights(weights.up_gate[expert], weights.up_gate_scales[expert]).chunk(2)
        down = dequantize_weights(weights.down[expert], weights.down_scales[expert])
        for served, again, projection in (
            (gate, matrices.gate, "w1"),
            (down, matrices.down, "w2"),
            (up, matrices.up, "w3"),
        ):
            assert torch.equal(served, stored_values(tensors, expert, projection))
            assert torch.equal(again, served)


def test_what_is_not_exact_is_told_with_its_layer_and_read_again_as_it_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tensors_of(90, 125)
    with Checkpoint(write(tmp_path, tensors)) as checkpoint, caplog.at_level(logging.WARNING):
        weights = load_layer(checkpoint, 0, range(EXPERTS), lambda _: None)
        down, matrices = dequantize_weights(weights.down[1], weights.down_scales[1]), read_expert(checkpoint, 0, 1)
    assert torch.equal(matrices.down, down)
    assert 0 < relative_error(down, stored_values(tensors, 1, "w2")) < 2.0**-11
    (record,) = caplog.records
    total = EXPERTS * 3 * HIDDEN * INNER
    off = sum(
        int((served != stored).sum())
        for expert in range(EXPERTS)
        for served, stored in zip(
            (
                *dequantize_weights(weights.up_gate[expert], weights.up_gate_scales[expert]).chunk(2),
                dequantize_weights(weights.down[expert], weights.down_scales[expert]),
            ),
            (stored_values(tensors, expert, name) for name in ("w3", "w1", "w2")),
            strict=True,
        )
    )
    assert record.getMessage().startswith(f"layer 0: {off} of {total} weights are not exact in FP8 blocks")


def test_fp8_blocks_under_the_same_names_are_served_as_they_are(tmp_path: Path) -> None:
    tensors = tensors_of()
    for expert in range(EXPERTS):
        for projection, (rows, columns) in SHAPES.items():
            values = torch.randn(rows, columns)
            tensors[name_of(expert, projection)] = values.to(FP8)
            tensors[name_of(expert, projection, "scale")] = torch.full((rows // 128, columns // 128), 0.5)
    with Checkpoint(write(tmp_path, tensors, expert_dtype="fp8")) as checkpoint:
        weights = load_layer(checkpoint, 0, range(EXPERTS), lambda _: None)
        assert stored_dtypes(checkpoint, {0: range(EXPERTS)}) == (FP8,)
    assert torch.equal(weights.down[2].float(), tensors[name_of(2, "w2")].float())
    assert (weights.down_scales == 0.5).all()


def change(name: str, value: Tensor) -> Tensors:
    return tensors_of() | {name: value}


WEIGHT, SCALE = name_of(1, "w2"), name_of(1, "w2", "scale")
REFUSED = {
    "no number": (
        change(SCALE, torch.full((256, 4), 255, dtype=torch.uint8).view(EXPONENTS)),
        "expected finite scales .* nan",
    ),
    "zeros": (
        change(WEIGHT, torch.full((256, 64), -0x78, dtype=torch.int8)),
        "w2.weight: expected weights, found nothing",
    ),
    "another shape": (
        change(WEIGHT, torch.ones(256, 128, dtype=torch.int8)),
        r"expected shape \[256, 64\], found \[256, 128\]",
    ),
    "other groups": (
        change(SCALE, torch.ones(256, 8).to(EXPONENTS)),
        r"w2.scale: expected shape \[256, 4\], found \[256, 8\]",
    ),
    "other scales": (change(SCALE, torch.ones(256, 4)), "w2.scale: expected dtype F8_E8M0, found F32"),
    "no scales": ({name: one for name, one in tensors_of().items() if name != SCALE}, "w2.scale is missing"),
    "another type": (change(WEIGHT, torch.ones(256, 128)), "expected dtype F8_E4M3 or BF16, found F32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused(case: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[case]
    with Checkpoint(write(tmp_path, tensors)) as checkpoint, pytest.raises(CheckpointError, match=message):
        load_layer(checkpoint, 0, range(EXPERTS), lambda _: None)


def test_it_is_not_served_in_bf16(tmp_path: Path) -> None:
    with (
        Checkpoint(write(tmp_path, tensors_of())) as checkpoint,
        pytest.raises(CheckpointError, match="is MXFP4, which is served as FP8; --weights bf16 is for checkpoints of"),
    ):
        layer_bytes(checkpoint, 0, range(EXPERTS), torch.bfloat16)


def test_other_families_do_not_take_it(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.0.mlp.experts.{expert}.{projection}.weight": torch.ones(rows, columns // 2, dtype=torch.int8)
        for expert in range(EXPERTS)
        for projection, (rows, columns) in zip(("gate_proj", "down_proj", "up_proj"), SHAPES.values(), strict=True)
    }
    fields = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "scoring_func": None, "swiglu_limit": None}
    with (
        Checkpoint(write(tmp_path, tensors, **fields)) as checkpoint,
        pytest.raises(CheckpointError, match="expected shape"),
    ):
        load_layer(checkpoint, 0, range(EXPERTS), lambda _: None)


@pytest.mark.parametrize("changed", [WEIGHT, SCALE])
def test_a_changed_byte_moves_the_digest_and_training_the_fingerprint(changed: str, tmp_path: Path) -> None:
    folder = write(tmp_path, tensors_of())
    with Checkpoint(folder) as checkpoint:
        before, fingerprint = Manifest.of(checkpoint, lambda _: None), sampled_fingerprint(checkpoint)
    tensors = load_file(folder / "model.safetensors")
    # Every byte of one tensor, its signs or powers of two.
    tensors[changed].view(torch.uint8).bitwise_xor_(1)
    with Checkpoint(write(tmp_path, tensors)) as checkpoint:
        assert sampled_fingerprint(checkpoint) != fingerprint
        assert list(before.differences(Manifest.of(checkpoint, lambda _: None))) == ["layer 0, expert 1"]


def test_the_ledger_settles_what_was_loaded(tmp_path: Path) -> None:
    folder = write(tmp_path, tensors_of())
    with Checkpoint(folder) as checkpoint:
        (folder / "expertd.manifest.json").write_text(Manifest.of(checkpoint, lambda _: None).text)
        load_layer(checkpoint, 0, range(EXPERTS), lambda _: None, Ledger(checkpoint).settle)
    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT][200, 3] ^= 1
    with (
        Checkpoint(write(tmp_path, tensors)) as checkpoint,
        pytest.raises(CheckpointError, match="layer 0, expert 1: "),
    ):
        load_layer(checkpoint, 0, range(EXPERTS), lambda _: None, Ledger(checkpoint).settle)
