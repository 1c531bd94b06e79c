"""The .proto is clean by buf's rules, and what would break released callers is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[2] / "proto"
BUF = str(Path(sys.executable).with_name("buf"))


def breaking(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [BUF, "breaking", str(folder), "--against", str(PROTO / "released.txtpb")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def changed(folder: Path, old: str, new: str) -> Path:
    """A copy of the contract with `old` replaced by `new`."""
    text = (PROTO / "expert_shard.proto").read_text()
    assert text.count(old) == 1
    (folder / "expert_shard.proto").write_text(text.replace(old, new))
    shutil.copy(PROTO / "buf.yaml", folder)
    return folder


def test_the_contract_is_clean_and_breaks_nobody() -> None:
    linted = subprocess.run([BUF, "lint", str(PROTO)], capture_output=True, text=True, timeout=60, check=False)
    assert linted.returncode == 0, linted.stdout
    compared = breaking(PROTO)
    assert compared.returncode == 0, compared.stdout


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("bytes hidden = 9;", "bytes hidden = 99;", 'field "9" with name "hidden"'),
        ("optional uint64 placement_epoch = 3;", "uint64 placement_epoch = 3;", "changed cardinality"),
        ("uint32 top_k = 6;", "uint32 slots = 6;", 'changed name from "top_k" to "slots"'),
        ("  bytes hidden_scales = 10;\n", "", '"hidden_scales"'),
        ("rpc ExecuteStream(stream ", "rpc ExecuteStream(", "from client streaming to client unary"),
        ("DTYPE_BFLOAT16 = 2;", "DTYPE_FLOAT16 = 2;", '"DTYPE_BFLOAT16"'),
    ],
)
def test_a_change_that_breaks_callers_is_refused(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    compared = breaking(changed(tmp_path, old, new))
    assert compared.returncode == 100
    assert complaint in compared.stdout


def test_an_addition_is_allowed(tmp_path: Path) -> None:
    compared = breaking(
        changed(tmp_path, "  uint64 timeout_us = 13;\n", "  uint64 timeout_us = 13;\n  bool later = 99;\n")
    )
    assert compared.returncode == 0, compared.stdout
