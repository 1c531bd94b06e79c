"""The native lane's code, compiled for its tests."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.native.build import NATIVE, SANITIZED, SUFFIX, build, build_library, load, part

HERE = Path(__file__).parent


@functools.cache
def built(name: str, *options: str, beside: tuple[str, ...] = ()) -> Path:
    """The program of NAME.cc with the lane's sources, and with all of the parts `beside`, compiled with `options`."""
    sources = {*lane_sources(), *part(*beside)}
    return build(_folder() / name, [HERE / f"{name}.cc", *sorted(sources)], *options, link=["-Wl,-z,now"])


@functools.cache
def hostile() -> Path:
    """The fuzzer, with the whole engine and sanitizers."""
    return built("hostile", *SANITIZED, beside=("engine", "request", "base", "tokens"))


@functools.cache
def extension() -> ModuleType:
    """The Python module `lane_testing`: both ends."""
    sources = [HERE / "lane_testing.cc", NATIVE / "bindings/lane.cc", *lane_sources()]
    return load("lane_testing", build_library(_folder() / f"lane_testing{SUFFIX}", sources))


@functools.cache
def lane_sources() -> list[Path]:
    names = ("control_groups", "cpus", "crc32c", "instructions", "spin", "spin_host")
    return [*part("lane"), *(NATIVE / "base" / f"{name}.cc" for name in names)]


def run(program: Path, *arguments: str, seconds: float = 120) -> str:
    """What it prints; its failure is the test's."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _folder() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return Path(tempfile.mkdtemp(prefix="lane-"))
