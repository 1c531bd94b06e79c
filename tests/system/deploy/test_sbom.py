"""The bill of materials: expertd and every package that an image holds, with what finds them in other databases."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SBOM = ROOT / "requirements/sbom.py"
VERSION = "0.1.0+g0123456789ab"


def bill(lock: Path) -> dict[str, Any]:
    printed = subprocess.check_output([sys.executable, "-I", str(SBOM), str(lock), VERSION], text=True)
    found: dict[str, Any] = json.loads(printed)
    return found


@pytest.mark.parametrize("name", ["client", "demo", "server"])
def test_it_names_expertd_and_everything_that_is_locked(name: str) -> None:
    lock = ROOT / f"requirements/{name}.lock"
    found, text = bill(lock), lock.read_text()
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    expertd = found["metadata"]["component"]
    assert (expertd["name"], expertd["version"]) == ("expertd", VERSION)
    assert expertd["purl"] == "pkg:pypi/expertd@0.1.0%2Bg0123456789ab"
    told = {one["name"]: one["version"] for one in found["components"]}
    assert told == dict(re.findall(r"^(\S+)==(\S+)", text, re.MULTILINE))
    assert {one["content"] for c in found["components"] for one in c["hashes"]} == set(
        re.findall(r"--hash=sha256:(\S+)", text)
    )
    (depending,) = found["dependencies"]
    assert depending == {"ref": expertd["bom-ref"], "dependsOn": [one["bom-ref"] for one in found["components"]]}
    assert len(set(depending["dependsOn"])) == len(told), "references are unique"


def test_a_build_of_torch_is_told_from_another() -> None:
    (torch,) = (one for one in bill(ROOT / "requirements/client.lock")["components"] if one["name"] == "torch")
    assert torch["purl"].endswith("%2Bcpu")


@pytest.mark.parametrize("line", ["numpy==2.4.0", "numpy>=2", "-r other.lock"])
def test_a_lock_file_that_says_less_is_refused(line: str, tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    lock.write_text(f"rich==14.0.0 \\\n    --hash=sha256:{'0' * 64}\n{line}\n")
    done = subprocess.run([sys.executable, str(SBOM), str(lock), VERSION], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ValueError: the lock file has 2 lines and 1 pins with hashes" in done.stderr
