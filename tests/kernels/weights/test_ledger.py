"""What a checkpoint's content is known by: its fingerprint, its manifest and the record of what was loaded earlier."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.kernels.weights.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointError, StoredTensor
from expertd.kernels.weights.experts import expert_tensors, load_layer
from expertd.kernels.weights.ledger import Ledger
from expertd.kernels.weights.manifest import MANIFEST, Manifest
from expertd.kernels.weights.record import RECORD
from expertd.kernels.weights.sample import sampled_fingerprint
from tests.support.mutations import DAMAGED, MUTATIONS, OTHER, Tensors, age, mutate_checkpoint, unsampled_place

LAYERS, EXPERTS = (1, 2), 16
PLAIN = DemoModel(
    hidden_size=256,
    moe_intermediate_size=128,
    n_routed_experts=EXPERTS,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    quantized=False,
)


def scale(tensors: Tensors) -> None:
    """The checkpoint of another training: every weight half as large again."""
    for (_, name), tensor in tensors.items():
        if name.endswith("_scale_inv"):
            tensor *= 1.5


def nudge(tensors: Tensors) -> None:
    """A fine-tune that moved one matrix of one expert, and no scale."""
    weight = tensors[DAMAGED, "up_proj.weight"]
    codes = weight.view(torch.uint8)
    codes.copy_(torch.where((codes & 0x7F) < 0x70, codes + 1, codes))


CHANGES = {**MUTATIONS, "scaled by 1.5": scale, "one matrix a little off": nudge}


@pytest.fixture
def folder(small_model: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own, of files that were written long ago."""
    copied = shutil.copytree(small_model, tmp_path / "model", ignore=shutil.ignore_patterns(RECORD))
    age(copied)
    return copied


def write_manifest(folder: Path) -> Manifest:
    with Checkpoint(folder) as checkpoint:
        manifest = Manifest.of(checkpoint, lambda _: None)
    (folder / MANIFEST).write_text(manifest.text)
    return manifest


def fingerprint(folder: Path) -> str:
    with Checkpoint(folder) as checkpoint:
        return sampled_fingerprint(checkpoint)


def load(folder: Path) -> str:
    """Load all experts as a server does; the fingerprint."""
    with Checkpoint(folder) as checkpoint:
        ledger = Ledger(checkpoint)
        for layer in LAYERS:
            load_layer(checkpoint, layer, range(EXPERTS), lambda _: None, ledger.settle)
        ledger.save()
        assert len(ledger.found(dict.fromkeys(LAYERS, range(EXPERTS)), 16)) == len(LAYERS) * EXPERTS * 16
    return ledger.fingerprint


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load(folder)
    return str(refused.value)


def flip(stored: StoredTensor, place: int, bit: int) -> None:
    with stored.file.open("r+b") as file:
        file.seek(stored.start + place)
        (byte,) = file.read(1)
        file.seek(stored.start + place)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_of_weights_gives_another_fingerprint(folder: Path, change: Callable[[Tensors], None]) -> None:
    before = fingerprint(folder)
    mutate_checkpoint(folder, 2, change)
    assert fingerprint(folder) != before


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_after_the_manifest_is_refused_by_the_experts_name(
    folder: Path, change: Callable[[Tensors], None]
) -> None:
    manifest = write_manifest(folder)
    assert load(folder) == manifest.fingerprint
    mutate_checkpoint(folder, 2, change)
    told = refusal(folder)
    wanted = manifest.experts[2][DAMAGED]
    assert re.match(
        rf"layer 2, expert {DAMAGED}: the weights that were loaded have digest [0-9a-f]{{64}}, but {folder / MANIFEST}"
        rf" says {wanted}: the file is damaged or another one",
        told,
    )


def test_a_byte_that_no_sample_holds_moves_the_digest_and_not_the_fingerprint(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        stored = expert_tensors(checkpoint, 1, DAMAGED)[0]
        before = Manifest.of(checkpoint, lambda _: None)
    original = fingerprint(folder)
    flip(stored, unsampled_place(stored), 0)
    assert fingerprint(folder) == original
    with Checkpoint(folder) as checkpoint:
        assert list(before.differences(Manifest.of(checkpoint, lambda _: None))) == [f"layer 1, expert {DAMAGED}"]


def test_two_thousand_flipped_bits_are_all_caught(folder: Path) -> None:
    write_manifest(folder)
    chance = random.Random(7)
    with Checkpoint(folder) as checkpoint:
        ledger = Ledger(checkpoint)
        for _ in range(2000):
            layer, expert = chance.choice(LAYERS), chance.randrange(EXPERTS)
            stored = chance.choice(expert_tensors(checkpoint, layer, expert))
            place, bit = chance.randrange(stored.num_bytes), chance.randrange(8)
            flip(stored, place, bit)
            with pytest.raises(CheckpointError, match=rf"layer {layer}, expert {expert}: |tensor {stored.name}: "):
                load_layer(checkpoint, layer, (expert,), lambda _: None, ledger.settle)
            flip(stored, place, bit)
        for layer in LAYERS:
            load_layer(checkpoint, layer, range(EXPERTS), lambda _: None, ledger.settle)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(("up_proj", "gate_proj", "down_proj")),
    st.integers(0, 255),
    st.floats(1.01, 4.0) | st.floats(0.1, 0.99),
)
def test_a_block_that_was_scaled_by_anything_gives_another_fingerprint(
    folder: Path, projection: str, block: int, factor: float
) -> None:
    before = fingerprint(folder)
    saved = {file: file.read_bytes() for file in folder.glob("*.safetensors")}

    def change(tensors: Tensors) -> None:
        scales = tensors[OTHER, f"{projection}.weight_scale_inv"].view(-1)
        scales[block % len(scales)] *= factor

    mutate_checkpoint(folder, 1, change)
    assert fingerprint(folder) != before
    for file, content in saved.items():
        file.write_bytes(content)


def test_a_manifest_is_the_same_however_the_model_is_split(folder: Path, tmp_path: Path) -> None:
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(folder / "config.json", single)
    tensors = {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}
    save_file(tensors, single / SINGLE)
    assert not (single / INDEX).exists()
    assert write_manifest(single).text == write_manifest(folder).text
    assert load(single) == load(folder)


def test_bf16_checkpoints_have_manifests_too(tmp_path: Path) -> None:
    folder = write_demo_checkpoint(tmp_path, PLAIN)
    write_manifest(folder)
    load(folder)
    with Checkpoint(folder) as checkpoint:
        stored = expert_tensors(checkpoint, 2, 3)[1]
    flip(stored, 99, 0)
    assert refusal(folder).startswith("layer 2, expert 3: the weights that were loaded have digest ")


def test_a_manifest_of_another_configuration_is_refused(folder: Path) -> None:
    write_manifest(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.0}))
    assert refusal(folder) == (
        f"{folder}/config.json is not what {folder / MANIFEST} was made of: routed_scaling_factor: 1.0 here, 2.5 in the"
        " manifest"
    )


def test_an_expert_that_the_manifest_lacks_is_refused(folder: Path) -> None:
    fields = json.loads(write_manifest(folder).text)
    fields["experts"]["2"].pop()
    (folder / MANIFEST).write_text(json.dumps(fields))
    assert re.match(rf"layer 2, expert 15: .*, but {folder / MANIFEST} has none for it: ", refusal(folder))


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "5", "{}", '{"format": 1, "experts": {"1": ["xyz"]}, "gates": {}, "config": {}}'),
        '{"format": 1, "experts": {"1": ["abcd"]}, "gates": {}, "config": {}}',
        '{"format": 1, "experts": {"1": 5}, "gates": {}, "config": {}}',
        '{"format": 2}',
    ],
)
def test_what_is_no_manifest_is_refused(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    assert refusal(folder).startswith(f"{folder / MANIFEST}: ")


def test_a_manifest_that_is_not_there_is_refused(folder: Path) -> None:
    with (
        Checkpoint(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"none\.json cannot be read: No such file or directory"),
    ):
        Ledger(checkpoint, folder / "none.json")


def test_what_was_found_is_recorded_and_holds_until_a_file_changes(folder: Path) -> None:
    found = load(folder)
    record = json.loads((folder / RECORD).read_text())
    assert record["fingerprint"] == found
    assert {layer: len(experts) for layer, experts in record["experts"].items()} == {"1": EXPERTS, "2": EXPERTS}
    (folder / RECORD).write_text(json.dumps(record | {"fingerprint": "from the record"}))
    assert load(folder) == "from the record"
    mutate_checkpoint(folder, 1, MUTATIONS["sign"])
    changed = load(folder)
    assert changed not in (found, "from the record")


def test_files_that_were_just_written_are_not_recorded(folder: Path) -> None:
    mutate_checkpoint(folder, 1, MUTATIONS["sign"])
    load(folder)
    assert not (folder / RECORD).exists()


def test_bytes_that_changed_by_themselves_are_refused_by_the_record(folder: Path) -> None:
    load(folder)
    with Checkpoint(folder) as checkpoint:
        stored = expert_tensors(checkpoint, 2, 11)[4]
    flip(stored, unsampled_place(stored), 2)
    age(folder)
    told = refusal(folder)
    assert told.startswith("layer 2, expert 11: the weights that were loaded have digest ")
    assert f"but {folder / RECORD} says " in told
    assert "so the disk or memory is at fault; if you did replace them, remove that file" in told
    (folder / RECORD).unlink()
    load(folder)


def test_servers_that_record_the_same_checkpoint_add_to_each_other(folder: Path) -> None:
    for experts in (range(8), range(8, 16)):
        with Checkpoint(folder) as checkpoint:
            ledger = Ledger(checkpoint)
            load_layer(checkpoint, 1, experts, lambda _: None, ledger.settle)
            ledger.save()
    assert len(json.loads((folder / RECORD).read_text())["experts"]["1"]) == 16


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1, "files": 5}'])
def test_a_record_that_cannot_be_read_is_made_again(folder: Path, content: str) -> None:
    found = load(folder)
    (folder / RECORD).write_text(content)
    assert load(folder) == found
    assert json.loads((folder / RECORD).read_text())["fingerprint"] == found


def test_the_record_of_a_folder_that_cannot_be_written_is_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Nobody, root neither, can put a file in the place of a folder.
    (folder / RECORD).mkdir()
    found = load(folder)
    (kept,) = (tmp_path / "cache" / "expertd" / "digests").iterdir()
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"fingerprint": "from the cache"}))
    assert load(folder) == "from the cache" != found


def zero(suffix: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for (expert, name), tensor in tensors.items():
            if expert == DAMAGED and name.endswith(suffix):
                tensor.view(torch.uint8).zero_()

    return change


@pytest.mark.parametrize("suffix", ["proj.weight", "down_proj.weight", "up_proj.weight_scale_inv"])
def test_experts_of_zeros_are_refused(folder: Path, suffix: str) -> None:
    mutate_checkpoint(folder, 2, zero(suffix))
    assert re.search(
        rf"model\.layers\.2\.mlp\.experts\.{DAMAGED}\..*: expected weights, found nothing but zeros, .* complete\?$",
        refusal(folder),
    )


def test_weights_without_a_positive_number_are_loaded(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        codes = tensors[DAMAGED, "down_proj.weight"].view(torch.uint8)
        codes |= 0x80
        codes[codes == 0xFF] = 0x80

    mutate_checkpoint(folder, 2, change)
    load(folder)


def test_bf16_experts_of_zeros_are_refused(tmp_path: Path) -> None:
    folder = write_demo_checkpoint(tmp_path, PLAIN)
    with Checkpoint(folder) as checkpoint:
        stored = expert_tensors(checkpoint, 1, 4)[2]
    with stored.file.open("r+b") as file:
        file.seek(stored.start)
        file.write(bytes(stored.num_bytes))
    assert f"tensor {stored.name}: expected weights, found nothing but zeros" in refusal(folder)
