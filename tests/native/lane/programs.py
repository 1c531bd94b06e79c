"""The native lane's code, compiled for its tests."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT}/native", "-Wl,-z,now"]


@functools.cache
def built(name: str, *flags: str) -> Path:
    """The program of NAME.cc with the lane's sources, compiled with `flags`."""
    return _compile(name, [HERE / f"{name}.cc", *lane_objects(*flags)], *flags)


@functools.cache
def extension() -> Path:
    """The Python module `lane_testing`: both ends."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-O1", "-fPIC", "-fvisibility=hidden"]
    sources = [HERE / "lane_testing.cc", ROOT / "native/bindings/lane.cc", *lane_objects(*flags)]
    return _compile("lane_testing.so", sources, "-shared", *flags, *includes)


@functools.cache
def lane_objects(*flags: str) -> list[Path]:
    """Of the lane's sources, for all programs with these flags."""
    return [
        _compile(f"{source.stem}.o", [source], "-c", *flags) for source in sorted((ROOT / "native/lane").glob("*.cc"))
    ]


def run(program: Path, *arguments: str, seconds: float = 120) -> str:
    """What it prints; its failure is the test's."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _compile(name: str, sources: list[Path], *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    out = Path(tempfile.mkdtemp(prefix="lane-")) / name
    subprocess.run([compiler, *FLAGS, *flags, *sources, "-o", out], check=True)
    return out
