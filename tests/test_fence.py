"""In CI a test that is skipped for anything but the GPU fails, where `.ci/run` can install what tests need."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fence.markers import NEEDS_GPU, fence_stands

ROOT = Path(__file__).parents[1]
TESTS = f"""
import pytest

@pytest.mark.skipif(True, reason="{NEEDS_GPU}")
def test_gpu(): ...

@pytest.mark.skip(reason="not today")
def test_marked(): ...

@pytest.fixture
def missing(): pytest.skip("no such program")

def test_fixture(missing): ...

def test_within(): pytest.skip("no such library")

@pytest.mark.xfail(strict=True)
def test_known_to_fail(): raise AssertionError
"""
MODULE = 'import pytest\npytest.skip("no such module", allow_module_level=True)\n'


def run_tests(folder: Path) -> tuple[int, dict[str, int]]:
    """Exit code and closing line of pytest in `folder`, under this repository's conftest."""
    (folder / "test_it.py").write_text(TESTS)
    (folder / "test_module.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    ended = subprocess.run(
        [*command, "--continue-on-collection-errors", "."], cwd=folder, env=environment, capture_output=True, text=True
    )
    closing = ended.stdout.splitlines()[-1]
    return ended.returncode, {what: int(count) for count, what in re.findall(r"(\d+) ([a-z]+)", closing)}


@pytest.mark.parametrize("ci", ["", "true"])
def test_only_the_gpu_lets_a_test_be_skipped_in_ci(tmp_path: Path, ci: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", ci)
    code, counts = run_tests(tmp_path)
    if fence_stands():
        assert (code, counts) == (1, {"failed": 1, "skipped": 1, "xfailed": 1, "errors": 3})
    else:
        assert (code, counts) == (0, {"skipped": 5, "xfailed": 1})
