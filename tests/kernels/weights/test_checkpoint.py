import errno
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.weights.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointError
from expertd.kernels.weights.sample import sampled_fingerprint

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
SCALES = f"{EXPERT}_scale_inv"
GATE = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
FP8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32

Reads = list[tuple[int, int]]
"""(offset, bytes) of every range that was read."""


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        EXPERT: random(128, 256).to(FP8),
        SCALES: random(1, 2).abs(),
        GATE: random(16, 256).to(BF16),
        BIAS: random(16),
        "model.embed_tokens.weight": random(64, 256).to(BF16),
    }


def _write(folder: Path, files: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any] = CONFIG) -> Path:
    """A checkpoint of `files`: a single `model.safetensors`, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    for file, tensors in files.items():
        save_file(dict(tensors), folder / file, metadata={"format": "pt"})
    if list(files) != [SINGLE]:
        _write_index(folder, {name: file for file, tensors in files.items() for name in tensors})
    return folder


def _write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}))


def _write_raw(folder: Path, header: Mapping[str, Any] | bytes, data: bytes = b"") -> Path:
    """A checkpoint whose single file has exactly this header and data."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    content = header if isinstance(header, bytes) else json.dumps(dict(header)).encode()
    (folder / SINGLE).write_bytes(len(content).to_bytes(8, "little") + content + data)
    return folder


def _entry(dtype: str, shape: Sequence[int], first: int, last: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.equal(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))
    )


def _open_descriptors(folder: Path) -> int:
    def target(descriptor: Path) -> str:
        try:
            return str(descriptor.readlink())
        except FileNotFoundError:
            return ""

    return sum(target(descriptor).startswith(str(folder)) for descriptor in Path("/proc/self/fd").iterdir())


@pytest.fixture(params=["single file", "two files with an index"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tensors = _tensors()
    if request.param == "single file":
        return _write(tmp_path / "checkpoint", {SINGLE: tensors})
    split = {"model-00001-of-00002.safetensors": [EXPERT, BIAS], "model-00002-of-00002.safetensors": [SCALES, GATE]}
    return _write(
        tmp_path / "checkpoint", {file: {name: tensors[name] for name in names} for file, names in split.items()}
    )


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What `preadv` is asked for from now on."""
    seen: Reads = []
    preadv = os.preadv

    def recorded(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        seen.append((offset, sum(buffer.nbytes for buffer in buffers)))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", recorded)
    return seen


@pytest.fixture
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`preadv` returns at most 1000 bytes at a time, as the kernel may."""
    preadv = os.preadv

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", short)


@pytest.mark.parametrize("name", [EXPERT, SCALES, GATE, BIAS])
def test_tensors_are_read_bit_for_bit(folder: Path, name: str) -> None:
    expected = _tensors()[name]
    with Checkpoint(folder) as checkpoint:
        assert _same_bits(checkpoint.read(name, tuple(expected.shape), FP8, BF16, F32), expected)


def test_reads_continue_where_a_short_one_ended(folder: Path, short_reads: None) -> None:
    with Checkpoint(folder) as checkpoint:
        assert _same_bits(checkpoint.read(EXPERT, (128, 256), FP8), _tensors()[EXPERT])


def test_a_tensor_is_read_into_the_middle_of_a_larger_one(folder: Path) -> None:
    target = torch.zeros(3, 128, 256).to(FP8)
    with Checkpoint(folder) as checkpoint:
        checkpoint.read_into(checkpoint.find(EXPERT), target[1])
    assert _same_bits(target[1], _tensors()[EXPERT])
    assert not target[0].float().any()
    assert not target[2].float().any()


def test_find_says_where_a_tensor_lies_and_what_it_is(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        stored = checkpoint.find(GATE)
    assert (stored.name, stored.dtype, stored.shape, stored.num_bytes) == (GATE, "BF16", (16, 256), 16 * 256 * 2)
    expected = _tensors()[GATE].view(torch.uint8).numpy().tobytes()
    assert stored.file.read_bytes()[stored.start : stored.start + stored.num_bytes] == expected


def test_only_the_bytes_asked_for_are_read(folder: Path, reads: Reads) -> None:
    with Checkpoint(folder) as checkpoint:
        stored = checkpoint.find(EXPERT)
        assert reads == []
        checkpoint.read(EXPERT, (128, 256), FP8)
    assert reads == [(stored.start, 128 * 256)]


def test_a_small_tensor_in_a_file_of_many_gigabytes_costs_its_own_bytes(tmp_path: Path, reads: Reads) -> None:
    gap = 8 << 30
    scales = torch.tensor([[1.5, -2.0]])
    header = {
        "before": _entry("BF16", (gap // 2,), 0, gap),
        SCALES: _entry("F32", (1, 2), gap, gap + 8),
        "after": _entry("U8", (gap,), gap + 8, 2 * gap + 8),
    }
    folder = _write_raw(tmp_path, header)
    start = (folder / SINGLE).stat().st_size + gap
    os.truncate(folder / SINGLE, start + 8 + gap)
    with (folder / SINGLE).open("r+b") as stream:
        stream.seek(start)
        stream.write(scales.numpy().tobytes())
    with Checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.read(SCALES, (1, 2), F32), scales)
    assert reads == [(start, 8)]


def test_headers_are_read_only_for_the_files_of_the_asked_tensors(tmp_path: Path) -> None:
    tensors = _tensors()
    folder = _write(tmp_path, {"one.safetensors": {EXPERT: tensors[EXPERT]}, "two.safetensors": {BIAS: tensors[BIAS]}})
    (folder / "one.safetensors").write_bytes(b"garbage")
    with Checkpoint(folder) as checkpoint:
        assert _same_bits(checkpoint.read(BIAS, (16,), F32), tensors[BIAS])


def test_threads_read_at_once(folder: Path) -> None:
    expected = {name: _tensors()[name] for name in (EXPERT, SCALES, GATE, BIAS)}
    with Checkpoint(folder) as checkpoint, ThreadPoolExecutor(16) as threads:

        def agrees(name: str) -> bool:
            return _same_bits(checkpoint.read(name, tuple(expected[name].shape), FP8, BF16, F32), expected[name])

        assert all(threads.map(agrees, list(expected) * 100))
        assert _open_descriptors(folder) == len(list(folder.glob("*.safetensors")))
    assert _open_descriptors(folder) == 0


def test_threads_that_open_a_file_at_once_leave_one_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _write(tmp_path, {SINGLE: _tensors()})
    racing = 4
    barrier = threading.Barrier(racing)
    opened: list[Path] = []
    open_file = os.open

    def meet(path: Path, flags: int) -> int:
        barrier.wait(timeout=10)
        opened.append(path)
        return open_file(path, flags)

    with Checkpoint(folder) as checkpoint, ThreadPoolExecutor(racing) as threads:
        monkeypatch.setattr(os, "open", meet)
        list(threads.map(lambda _: checkpoint.read(BIAS, (16,), F32), range(racing)))
        monkeypatch.undo()
        assert len(opened) == racing
        assert _open_descriptors(folder) == 1


def test_close_closes_every_file_and_may_be_repeated(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert _open_descriptors(folder) == 0
    for name in (EXPERT, GATE):
        checkpoint.read_into(checkpoint.find(name), torch.empty_like(_tensors()[name]))
    assert _open_descriptors(folder) == len(list(folder.glob("*.safetensors")))
    checkpoint.close()
    checkpoint.close()
    assert _open_descriptors(folder) == 0


def test_close_leaves_a_read_that_is_under_way_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _write(tmp_path / "model", {SINGLE: _tensors()})
    other = tmp_path / "other"
    other.write_bytes(bytes((folder / SINGLE).stat().st_size))
    checkpoint = Checkpoint(folder)
    preadv, opened = os.preadv, []

    def late(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        checkpoint.close()
        opened.append(os.open(other, os.O_RDONLY))
        return preadv(descriptor, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", late)
        read = checkpoint.read(BIAS, (16,), F32)
    os.close(opened[0])
    assert _same_bits(read, _tensors()[BIAS])
    assert _open_descriptors(folder) == 0


def test_leaving_the_block_with_an_error_closes_every_file(folder: Path) -> None:
    def read_two() -> None:
        with Checkpoint(folder) as checkpoint:
            checkpoint.read(BIAS, (16,), F32)
            checkpoint.find("absent")

    with pytest.raises(CheckpointError):
        read_two()
    assert _open_descriptors(folder) == 0


def _fingerprint(folder: Path) -> str:
    with Checkpoint(folder) as checkpoint:
        return sampled_fingerprint(checkpoint)


def _resave(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    return _fingerprint(_write(folder, {SINGLE: tensors}))


def test_the_fingerprint_is_the_same_for_the_same_model_however_it_is_split(tmp_path: Path) -> None:
    tensors = _tensors()
    single = _resave(tmp_path / "single", tensors)
    assert len(bytes.fromhex(single)) == 32
    assert _resave(tmp_path / "again", tensors) == single
    one_each = {f"part-{index}.safetensors": {name: tensors[name]} for index, name in enumerate(reversed(tensors))}
    assert _fingerprint(_write(tmp_path / "split", one_each)) == single


@pytest.mark.parametrize(
    "change",
    [{"num_experts_per_tok": 4}, {"routed_scaling_factor": 1.0}, {"num_hidden_layers": 3}, {"norm_topk_prob": False}],
    ids=str,
)
def test_the_fingerprint_changes_with_the_configuration(tmp_path: Path, change: dict[str, Any]) -> None:
    changed = _write(tmp_path / "changed", {SINGLE: _tensors()}, CONFIG | change)
    assert _fingerprint(changed) != _resave(tmp_path / "original", _tensors())


HEADER_CHANGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "dtype": lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(BF16)}),
    "shape": lambda tensors: tensors.update({EXPERT: tensors[EXPERT].view(256, 128)}),
    "name": lambda tensors: tensors.update({EXPERT.replace("experts.0", "experts.1"): tensors.pop(EXPERT)}),
    "one tensor fewer": lambda tensors: tensors.pop(SCALES),
    "bias dtype": lambda tensors: tensors.update({BIAS: tensors[BIAS].to(BF16)}),
}


@pytest.mark.parametrize("change", HEADER_CHANGES.values(), ids=HEADER_CHANGES)
def test_the_fingerprint_changes_with_the_header_of_an_expert_or_gate(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object]
) -> None:
    tensors = _tensors()
    change(tensors)
    assert _resave(tmp_path / "changed", tensors) != _resave(tmp_path / "original", _tensors())


@pytest.mark.parametrize("name", [GATE, BIAS, SCALES])
def test_the_fingerprint_covers_every_element_of_gates_and_scales(tmp_path: Path, name: str) -> None:
    tensors = _tensors()
    original = _resave(tmp_path / "original", tensors)
    for element in (0, tensors[name].numel() // 2, -1):
        changed = tensors[name].clone()
        changed.view(-1)[element] += 1
        assert _resave(tmp_path / f"changed-{element}", tensors | {name: changed}) != original, f"element {element}"


def test_the_fingerprint_reads_a_gate_shorter_than_the_sample(tmp_path: Path) -> None:
    tensors = {GATE: torch.ones(16, 8)}
    changed = tensors[GATE].clone()
    changed[-1, -1] = 2
    assert _resave(tmp_path / "changed", {GATE: changed}) != _resave(tmp_path / "original", tensors)


def test_the_fingerprint_ignores_what_is_not_an_expert_or_gate(tmp_path: Path) -> None:
    tensors = _tensors() | {"model.norm.weight": torch.ones(256), "model.embed_tokens.weight": torch.zeros(8)}
    assert _resave(tmp_path / "changed", tensors) == _resave(tmp_path / "original", _tensors())


def test_the_fingerprint_reads_four_pages_of_a_weight_one_of_each_quarter(tmp_path: Path, reads: Reads) -> None:
    folder = _write(tmp_path, {SINGLE: _tensors()})
    with Checkpoint(folder) as checkpoint:
        weight = checkpoint.find(EXPERT)
        sampled_fingerprint(checkpoint)
    quarter = weight.num_bytes // 4
    pages = [(start - weight.start, size) for start, size in reads if 0 <= start - weight.start < weight.num_bytes]
    assert [(start // quarter, (start + size - 1) // quarter, size) for start, size in sorted(pages)] == [
        (number, number, 4096) for number in range(4)
    ]


def _refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as refusal:
        action()
    return str(refusal.value)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=f"{tmp_path}/config.json does not exist"):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert _refusal(lambda: Checkpoint(tmp_path)) == f"{tmp_path}: expected {INDEX} or {SINGLE}, found neither"


@pytest.mark.parametrize(
    "content",
    [b"{", b'{"metadata": {}}', b"[]", b"\xff", b'{"weight_map": ["x"]}', b'{"weight_map": {"x": 5}}'],
    ids=["not JSON", "no weight_map", "a list", "not UTF-8", "weight_map a list", "file a number"],
)
def test_an_unusable_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / INDEX).write_bytes(content)
    message = _refusal(lambda: Checkpoint(tmp_path))
    assert message.startswith(f"{tmp_path / INDEX}: expected JSON with a weight_map of file names: ")


@pytest.mark.parametrize("file", ["/etc/passwd", "../model.safetensors", "sub/model.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    _write_index(tmp_path, {BIAS: file})
    assert _refusal(lambda: Checkpoint(tmp_path)) == (
        f"{tmp_path / INDEX}: expected names of files beside it, found {file!r}"
    )


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    _write_index(tmp_path, {BIAS: "folder"})
    (tmp_path / "folder").mkdir()
    with Checkpoint(tmp_path) as checkpoint:
        assert _refusal(lambda: checkpoint.find(BIAS)) == f"{tmp_path / 'folder'} cannot be read: Is a directory"


def test_a_file_that_vanishes_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    folder = _write(tmp_path, {SINGLE: _tensors()})
    with Checkpoint(folder) as checkpoint:
        stored = checkpoint.find(BIAS)
        (folder / SINGLE).unlink()
        refusal = _refusal(lambda: checkpoint.load(stored))
    assert refusal == f"{folder / SINGLE}: tensor {BIAS} cannot be read: No such file or directory"


def test_files_out_of_reach_have_no_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    # Within: pytest looks at files, too.
    with Checkpoint(folder) as checkpoint, monkeypatch.context() as patched:
        patched.setattr(Path, "stat", refuse)
        states = checkpoint.file_states()
    assert set(map(tuple, states.values())) == {(0, 0)}


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    folder = _write_raw(tmp_path, {BIAS: _entry("F32", (16,), 0, 64), GATE: _entry("F32", (16,), 60, 124)}, bytes(124))
    assert _refusal(lambda: Checkpoint(folder)) == (
        f"{folder / SINGLE}: tensors {BIAS} and {GATE} overlap; expected disjoint ranges"
    )


def test_a_missing_tensor_is_named(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        assert _refusal(lambda: checkpoint.read("model.absent", (1,), F32)) == (
            f"{folder}: tensor model.absent is missing from the checkpoint"
        )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = _write(tmp_path, {"one.safetensors": _tensors()})
    (folder / "one.safetensors").unlink()
    with Checkpoint(folder) as checkpoint:
        assert _refusal(lambda: checkpoint.find(GATE)) == (f"{folder / 'one.safetensors'} is missing; {INDEX} names it")


def test_a_tensor_that_is_not_in_the_file_of_its_index_entry_is_named(tmp_path: Path) -> None:
    tensors = _tensors()
    folder = _write(tmp_path, {"one.safetensors": {EXPERT: tensors[EXPERT]}, "two.safetensors": {BIAS: tensors[BIAS]}})
    _write_index(folder, {EXPERT: "two.safetensors"})
    with Checkpoint(folder) as checkpoint:
        assert _refusal(lambda: checkpoint.find(EXPERT)) == (
            f"{folder / 'two.safetensors'}: tensor {EXPERT} is missing; {INDEX} says that it is in this file"
        )


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_truncated_file_is_refused_naming_the_last_tensor(tmp_path: Path, cut: int) -> None:
    header = {EXPERT: _entry("F8_E4M3", (128, 256), 0, 32768), GATE: _entry("BF16", (16, 256), 32768, 40960)}
    folder = _write_raw(tmp_path, header, bytes(40960))
    size = (folder / SINGLE).stat().st_size
    os.truncate(folder / SINGLE, size - cut)
    assert _refusal(lambda: Checkpoint(folder)) == (
        f"{folder / SINGLE}: truncated: tensor {GATE}: expected {size} bytes in the file, found {size - cut}"
    )


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    folder = _write_raw(tmp_path, {BIAS: _entry("F32", (16,), 0, 64)}, bytes(64))
    with Checkpoint(folder) as checkpoint:
        checkpoint.find(BIAS)
        os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 24)
        assert _refusal(lambda: checkpoint.read(BIAS, (16,), F32)) == (
            f"{folder / SINGLE}: tensor {BIAS}: expected 64 bytes, found 40"
        )


@pytest.mark.parametrize(
    ("content", "length"),
    [
        (b"", 0),
        (b"\x02\0\0", 2),
        (bytes(64), 0),
        (b"\xff" * 64, 2**64 - 1),
        ((57).to_bytes(8, "little") + b"{}" + b" " * 54, 57),
    ],
    ids=["empty file", "cut length", "zeros", "ones", "one byte short"],
)
def test_a_header_length_outside_the_file_is_refused(tmp_path: Path, content: bytes, length: int) -> None:
    folder = _write_raw(tmp_path, {})
    (folder / SINGLE).write_bytes(content)
    assert _refusal(lambda: Checkpoint(folder)) == (
        f"{folder / SINGLE}: expected a safetensors header within {len(content)} bytes, found length {length}"
    )


@pytest.mark.parametrize("header", [b"<html></html>", b"\xff\xfe\xfd\xfc", b'{"a": '], ids=["HTML", "bytes", "cut"])
def test_a_header_that_is_not_json_is_refused(tmp_path: Path, header: bytes) -> None:
    folder = _write_raw(tmp_path, header)
    message = _refusal(lambda: Checkpoint(folder))
    assert message.startswith(f"{folder / SINGLE}: expected a JSON safetensors header, found: ")


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (_entry("F32", (16,), 0, 63), f"{BIAS}: 63 bytes for F32 [16]"),
        (_entry("F32", (16,), 0, 128), f"{BIAS}: 128 bytes for F32 [16]"),
        (_entry("BF16", (16,), 64, 32), f"{BIAS}: data_offsets [64, 32], shape [16]"),
        (_entry("F32", (2,), -8, 0), f"{BIAS}: data_offsets [-8, 0], shape [2]"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}, "data_offsets [0.0, 8.0]"),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, "shape [-1, -2]"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "unhashable"),
        ({"dtype": "F32", "shape": [16]}, "data_offsets"),
        ({"dtype": "F32", "data_offsets": [0, 64]}, "shape"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [0, 32, 64]}, "too many values to unpack"),
        ("F32", "string indices must be integers"),
    ],
    ids=[
        *("too few", "too many", "backwards", "before the data", "fractions", "negative shape", "dtype a list"),
        *("no offsets", "no shape", "three offsets", "text"),
    ],
)
def test_a_malformed_header_entry_is_refused(tmp_path: Path, entry: object, found: str) -> None:
    folder = _write_raw(tmp_path, {BIAS: entry}, bytes(128))
    message = _refusal(lambda: Checkpoint(folder))
    assert message.startswith(f"{folder / SINGLE}: malformed safetensors header: ")
    assert found in message


def test_a_wrong_shape_is_named_beside_the_expected_one(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        file = checkpoint.find(EXPERT).file
        assert _refusal(lambda: checkpoint.read(EXPERT, (256, 128), FP8)) == (
            f"{file}: tensor {EXPERT}: expected shape [256, 128], found [128, 256]"
        )


def test_a_wrong_dtype_is_named_beside_the_expected_ones(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        file = checkpoint.find(SCALES).file
        assert _refusal(lambda: checkpoint.read(SCALES, (1, 2), FP8, BF16)) == (
            f"{file}: tensor {SCALES}: expected dtype F8_E4M3 or BF16, found F32"
        )


def test_a_dtype_that_expertd_does_not_know_is_named(tmp_path: Path) -> None:
    folder = _write_raw(tmp_path, {SCALES: _entry("F8_E5M2", (1, 2), 0, 2)}, bytes(2))
    with Checkpoint(folder) as checkpoint:
        assert _refusal(lambda: checkpoint.read(SCALES, (1, 2), F32)) == (
            f"{folder / SINGLE}: tensor {SCALES}: expected dtype F32, found F8_E5M2"
        )
