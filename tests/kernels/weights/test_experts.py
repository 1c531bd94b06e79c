import dataclasses
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.kernels.numerics.backend import LayerWeights
from expertd.kernels.numerics.quantize import FP8, quantize_weights
from expertd.kernels.weights.checkpoint import INDEX, Checkpoint, CheckpointError
from expertd.kernels.weights.experts import layer_bytes, load_layer

QUANTIZED = DemoModel(
    hidden_size=256, moe_intermediate_size=128, n_routed_experts=12, num_experts_per_tok=2, n_group=2, topk_group=1
)
PLAIN = dataclasses.replace(QUANTIZED, quantized=False)
EXPERTS = (3, 4, 9)


class Tally:
    """What `on_bytes` heard."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def __call__(self, count: int) -> None:
        self.heard.append(count)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both checkpoints, which no test changes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for model in (QUANTIZED, PLAIN):
        write_demo_checkpoint(folder, model)
    return folder


@pytest.fixture
def quantized(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written / QUANTIZED.name, tmp_path / "quantized")


@pytest.fixture
def plain(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written / PLAIN.name, tmp_path / "plain")


def _name(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


def _file(folder: Path, name: str) -> Path:
    file: str = json.loads((folder / INDEX).read_text())["weight_map"][name]
    return folder / file


def _official(folder: Path, name: str) -> Tensor:
    """Tensor `name` as the safetensors package reads it."""
    with safe_open(_file(folder, name), framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
        return tensor


def _overwrite(folder: Path, name: str, value: float) -> Path:
    """Set the last element of tensor `name` in its file to `value`."""
    with Checkpoint(folder) as checkpoint:
        stored = checkpoint.find(name)
    element = torch.tensor([value], dtype={"F32": torch.float32, "BF16": torch.bfloat16}[stored.dtype])
    with stored.file.open("r+b") as stream:
        stream.seek(stored.start + stored.num_bytes - element.element_size())
        stream.write(element.view(torch.uint8).numpy().tobytes())
    return stored.file


def _rename_in_header(folder: Path, name: str, new: str) -> None:
    """Give a tensor another name of the same length, in its file and in the index."""
    for file in (_file(folder, name), folder / INDEX):
        content = file.read_bytes()
        assert content.count(name.encode()) >= 1
        file.write_bytes(content.replace(f'"{name}"'.encode(), f'"{new}"'.encode()))


def _load(folder: Path, layer: int, experts: Sequence[int] = EXPERTS) -> LayerWeights:
    with Checkpoint(folder) as checkpoint:
        return load_layer(checkpoint, layer, experts, Tally())


def _refusal(folder: Path, layer: int, experts: Sequence[int] = EXPERTS) -> str:
    with pytest.raises(CheckpointError) as refusal:
        _load(folder, layer, experts)
    return str(refusal.value)


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(
        found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


def test_fp8_weights_are_the_checkpoints_bits(quantized: Path) -> None:
    weights = _load(quantized, 1)
    assert weights.num_experts == len(EXPERTS)
    for local, expert in enumerate(EXPERTS):
        up, gate, down = (_name(1, expert, projection) for projection in ("up_proj", "gate_proj", "down_proj"))
        both = torch.cat([_official(quantized, up), _official(quantized, gate)])
        both_scales = torch.cat([_official(quantized, f"{name}_scale_inv") for name in (up, gate)])
        assert _same_bits(weights.up_gate[local], both)
        assert _same_bits(weights.up_gate_scales[local], both_scales)
        assert _same_bits(weights.down[local], _official(quantized, down))
        assert _same_bits(weights.down_scales[local], _official(quantized, f"{down}_scale_inv"))


def test_bf16_weights_are_quantised_while_loading(plain: Path) -> None:
    weights = _load(plain, 1)
    for local, expert in enumerate(EXPERTS):
        up, gate, down = (
            quantize_weights(_official(plain, _name(1, expert, projection)))
            for projection in ("up_proj", "gate_proj", "down_proj")
        )
        assert _same_bits(weights.up_gate[local], torch.cat([up[0], gate[0]]))
        assert _same_bits(weights.up_gate_scales[local], torch.cat([up[1], gate[1]]))
        assert _same_bits(weights.down[local], down[0])
        assert _same_bits(weights.down_scales[local], down[1])


@pytest.mark.parametrize("model", [QUANTIZED, PLAIN], ids=["FP8", "BF16"])
def test_weights_have_the_backends_layout(model: DemoModel, written: Path) -> None:
    weights = _load(written / model.name, 2)
    layout = {
        "up_gate": ((3, 256, 256), FP8),
        "up_gate_scales": ((3, 2, 2), torch.float32),
        "down": ((3, 256, 128), FP8),
        "down_scales": ((3, 2, 1), torch.float32),
    }
    for name, (shape, dtype) in layout.items():
        tensor = getattr(weights, name)
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True), name


def test_every_layer_gets_its_own_weights(quantized: Path) -> None:
    with Checkpoint(quantized) as checkpoint:
        for layer in checkpoint.config.moe_layers:
            weights = load_layer(checkpoint, layer, (7,), Tally())
            assert _same_bits(weights.down[0], _official(quantized, _name(layer, 7, "down_proj")))
    assert not torch.equal(
        _official(quantized, _name(1, 7, "down_proj")).float(), _official(quantized, _name(2, 7, "down_proj")).float()
    )


def test_loading_twice_gives_the_same_bits(plain: Path) -> None:
    first, second = _load(plain, 1), _load(plain, 1)
    assert _same_bits(first.up_gate, second.up_gate)
    assert _same_bits(first.down, second.down)


@pytest.mark.parametrize("experts", [(0,), (11,), (0, 5, 11), tuple(range(12))], ids=str)
def test_progress_adds_up_to_layer_bytes(quantized: Path, experts: tuple[int, ...]) -> None:
    tally = Tally()
    with Checkpoint(quantized) as checkpoint:
        total = layer_bytes(checkpoint, 1, experts)
        load_layer(checkpoint, 1, experts, tally)
    assert total == len(experts) * 3 * (256 * 128 + 2 * 4)
    assert sum(tally.heard) == total
    assert len(tally.heard) == 3 * len(experts)


def test_progress_of_bf16_counts_the_bytes_read(plain: Path) -> None:
    tally = Tally()
    with Checkpoint(plain) as checkpoint:
        load_layer(checkpoint, 1, EXPERTS, tally)
        assert sum(tally.heard) == layer_bytes(checkpoint, 1, EXPERTS) == len(EXPERTS) * 3 * 256 * 128 * 2


def test_only_the_wanted_experts_of_the_wanted_layer_are_read(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[int, int]] = []
    preadv = os.preadv

    def recorded(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        ranges.append((offset, buffers[0].nbytes))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", recorded)
    with Checkpoint(quantized) as checkpoint:
        load_layer(checkpoint, 2, (4,), Tally())
        names = [_name(2, 4, projection) for projection in ("up_proj", "gate_proj", "down_proj")]
        stored = [checkpoint.find(name) for weight in names for name in (weight, f"{weight}_scale_inv")]
    assert sorted(ranges) == sorted((tensor.start, tensor.num_bytes) for tensor in stored)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.5])
@pytest.mark.parametrize("projection", ["up_proj", "gate_proj", "down_proj"])
def test_a_scale_that_is_not_finite_or_negative_is_refused(quantized: Path, projection: str, value: float) -> None:
    name = f"{_name(1, 4, projection)}_scale_inv"
    file = _overwrite(quantized, name, value)
    assert _refusal(quantized, 1) == f"{file}: tensor {name}: expected finite scales >= 0, found {value}"


def test_a_bad_scale_of_an_expert_that_is_not_loaded_does_no_harm(quantized: Path) -> None:
    _overwrite(quantized, f"{_name(1, 5, 'up_proj')}_scale_inv", float("nan"))
    assert _load(quantized, 1).num_experts == len(EXPERTS)


def test_a_scale_of_zero_is_taken(quantized: Path) -> None:
    _overwrite(quantized, f"{_name(1, 9, 'down_proj')}_scale_inv", 0.0)
    assert _load(quantized, 1).down_scales[-1].view(-1)[-1] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("projection", ["up_proj", "gate_proj", "down_proj"])
def test_a_bf16_weight_that_is_not_finite_is_refused(plain: Path, projection: str, value: float) -> None:
    name = _name(2, 9, projection)
    file = _overwrite(plain, name, value)
    assert _refusal(plain, 2) == f"{file}: tensor {name}: expected finite values, found NaN or Inf"


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("projection", ["up_proj", "gate_proj", "down_proj"])
def test_an_fp8_weight_that_is_nan_is_refused(quantized: Path, projection: str, code: int) -> None:
    name = _name(1, 9, projection)
    with Checkpoint(quantized) as checkpoint:
        stored = checkpoint.find(name)
    with stored.file.open("r+b") as file:
        file.seek(stored.start + stored.num_bytes - 1)
        file.write(bytes([code]))
    assert _refusal(quantized, 1) == f"{stored.file}: tensor {name}: expected finite values, found NaN"


@pytest.mark.parametrize("suffix", ["", "_scale_inv"], ids=["weight", "scales"])
@pytest.mark.parametrize("projection", ["up_proj", "gate_proj", "down_proj"])
def test_a_missing_tensor_is_refused_before_anything_is_read(
    quantized: Path, projection: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = _name(1, EXPERTS[-1], projection) + suffix
    _rename_in_header(quantized, name, name.replace("mlp", "MLP"))
    with Checkpoint(quantized) as checkpoint:
        with monkeypatch.context() as patched:
            patched.delattr(os, "preadv")
            with pytest.raises(CheckpointError, match=f"tensor {re.escape(name)} is missing from the checkpoint$"):
                layer_bytes(checkpoint, 1, EXPERTS)
        assert layer_bytes(checkpoint, 1, EXPERTS[:-1]) > 0


def test_a_missing_expert_is_refused_while_loading_too(quantized: Path) -> None:
    name = _name(1, 4, "down_proj")
    _rename_in_header(quantized, name, name.replace("mlp", "MLP"))
    assert _refusal(quantized, 1) == f"{quantized}: tensor {name} is missing from the checkpoint"


def test_an_expert_beyond_the_model_is_missing(quantized: Path) -> None:
    with (
        Checkpoint(quantized) as checkpoint,
        pytest.raises(CheckpointError, match=re.escape(f"tensor {_name(1, 12, 'up_proj')} is missing")),
    ):
        layer_bytes(checkpoint, 1, (11, 12))


def test_a_dense_layer_has_no_experts(quantized: Path) -> None:
    with (
        Checkpoint(quantized) as checkpoint,
        pytest.raises(CheckpointError, match=re.escape(f"tensor {_name(0, 0, 'up_proj')} is missing")),
    ):
        layer_bytes(checkpoint, 0, (0,))


def test_sizes_that_differ_from_the_configuration_are_refused(quantized: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 256}))
    name = _name(1, 3, "up_proj")
    expected = f"{_file(quantized, name)}: tensor {name}: expected shape [256, 256], found [128, 256]"
    with Checkpoint(quantized) as checkpoint, pytest.raises(CheckpointError, match=f"^{re.escape(expected)}$"):
        layer_bytes(checkpoint, 1, EXPERTS)
    assert _refusal(quantized, 1, (3,)) == expected


def test_weights_of_another_dtype_are_refused(quantized: Path) -> None:
    name = _name(1, 3, "gate_proj")
    file = _file(quantized, name)
    content = file.read_bytes()
    entry = f'"{name}":{{"dtype":"F8_E4M3"'.encode()
    assert content.count(entry) == 1
    file.write_bytes(content.replace(entry, entry.replace(b"F8_E4M3", b"F8_E5M2")))
    assert _refusal(quantized, 1) == f"{file}: tensor {name}: expected dtype F8_E4M3 or BF16, found F8_E5M2"


def test_a_truncated_file_is_refused(quantized: Path) -> None:
    file = _file(quantized, _name(1, 0, "up_proj"))
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    message = _refusal(quantized, 1)
    assert message.startswith(f"{file}: truncated: tensor ")
    assert message.endswith(f": expected {size} bytes in the file, found {size - 1000}")


def test_scales_in_bf16_are_taken(quantized: Path) -> None:
    name = f"{_name(1, 3, 'down_proj')}_scale_inv"
    file = _file(quantized, name)
    tensors = {
        one: _official(quantized, one)
        for one in json.loads((quantized / INDEX).read_text())["weight_map"]
        if _file(quantized, one) == file
    }
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(_load(quantized, 1).down_scales[0], tensors[name].float())
