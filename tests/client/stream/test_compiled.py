"""The kernels of stream-ordered calls compile without a GPU, with the arguments of calls, and spill no registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from expertd.kernels.cutile.tools.inspect import Resources
from expertd.kernels.weights.files import cache_folder

ROOT = Path(__file__).parents[3]


def compiled(arch: str, *warps: str) -> dict[str, Resources]:
    """What each uses, by name; by a process in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache_folder() / "triton")
    command = [sys.executable, "-m", "tests.support.kernels.stream", arch, *warps]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: Resources(**used) for name, used in json.loads(done.stdout).items()}


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_nothing_spills(arch: str) -> None:
    found = compiled(arch)
    names = [name.partition("(")[0] for name in found]
    # By ids, formats of hidden states and sums, and whether servers get all tokens.
    assert {name: names.count(name) for name in set(names)} == {
        "compact": 2,
        "dispatch": 8,
        "post": 2,
        "settle": 2,
        "combine": 4,
    }
    assert not {name: used for name, used in found.items() if used.spills}


def test_spills_are_seen() -> None:
    (used,) = compiled("sm_90", "1").values()
    assert used.spills
    assert used.stack > 0
    assert used.local_accesses > 0
