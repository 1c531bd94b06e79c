"""`expertd fingerprint`: the manifest of a checkpoint, made and checked."""

import hashlib
import shutil
from pathlib import Path

import pytest

from expertd import cli
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.manifest import MANIFEST
from expertd.kernels.weights.record import RECORD
from tests.support.mutations import DAMAGED, MUTATIONS, OTHER, mutate_checkpoint


@pytest.fixture
def folder(small_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_model, tmp_path / "model", ignore=shutil.ignore_patterns(RECORD))


def fingerprint(*arguments: object) -> int:
    return cli.main(["fingerprint", *map(str, arguments)])


def test_the_fingerprint_is_what_sha256sum_prints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fingerprint(folder) == 0
    captured = capsys.readouterr()
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert captured.out == f"{digest}  {folder / MANIFEST}\n"
    assert captured.err.startswith(f"{folder}: 32 experts and 4 tensors of gates, 0.00 GB in ")
    assert fingerprint(folder) == 0, "the same again"
    assert fingerprint(folder, "--output", folder / "other.json") == 0
    assert (folder / "other.json").read_bytes() == (folder / MANIFEST).read_bytes()


def test_a_checkpoint_is_checked_and_all_that_differs_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fingerprint(folder)
    digest = capsys.readouterr().out.split()[0]
    assert fingerprint(folder, "--check", folder / MANIFEST) == 0
    verdict = f"0 differences between {folder} and {folder / MANIFEST}, {digest}\n"
    assert capsys.readouterr().out == f"OK: {verdict}"
    mutate_checkpoint(folder, 2, MUTATIONS["two experts swapped"])
    assert fingerprint(folder, "--check", folder / MANIFEST) == 1
    assert capsys.readouterr().out == (
        f"differs: layer 2, expert {DAMAGED}\ndiffers: layer 2, expert {OTHER}\nFAILED: 2{verdict[1:]}"
    )


def test_gates_and_the_configuration_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fingerprint(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"routed_scaling_factor": 2.5', '"routed_scaling_factor": 2.0'))
    with Checkpoint(folder) as checkpoint:
        gate = checkpoint.find("model.layers.1.mlp.gate.weight")
    with gate.file.open("r+b") as file:
        file.seek(gate.start)
        file.write(b"\1\2\3\4")
    capsys.readouterr()
    assert fingerprint(folder, "--check", folder / MANIFEST) == 1
    assert capsys.readouterr().out.splitlines()[:2] == [
        "differs: routed_scaling_factor: 2.0 here, 2.5 in the manifest",
        f"differs: {gate.name}",
    ]


def test_a_manifest_of_another_content_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fingerprint(folder)
    before = (folder / MANIFEST).read_bytes()
    mutate_checkpoint(folder, 1, MUTATIONS["sign"])
    assert fingerprint(folder) == 2
    assert (
        f"{folder / MANIFEST} is of another content: look at it with --check, or remove it" in capsys.readouterr().err
    )
    assert (folder / MANIFEST).read_bytes() == before


def test_what_cannot_be_read_exits_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fingerprint(folder / "none") == 2
    assert "none/config.json does not exist" in capsys.readouterr().err
    assert fingerprint(folder, "--check", folder / "none.json") == 2
    assert "none.json cannot be read: No such file or directory" in capsys.readouterr().err
