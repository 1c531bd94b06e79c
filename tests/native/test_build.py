"""The native core, compiled for other machines and under sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.native.build import NATIVE, ROOT, SUFFIX, build_library, part, sanitizer

PORTABLE = part("base", "tokens")
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-ffp-contract=off", f"-I{NATIVE}"]
RUNTIMES = {"address,undefined": "libasan.so", "thread": "libtsan.so"}


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("target", ["aarch64-macos", "x86_64-macos"])
def test_other_machines_can_have_it(target: str, tmp_path: Path) -> None:
    """Beside Linux, whose wheels `test_wheels.py` makes. Without its Python faces: the headers here are Linux's."""
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-O0", *FLAGS, "-c"]

    def compile_one(source: Path) -> None:
        run(*zig, str(source), "-o", str(tmp_path / f"{source.stem}.o"))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(compile_one, PORTABLE))


@pytest.mark.parametrize("kind", RUNTIMES)
def test_sanitizers_find_nothing(kind: str, tmp_path: Path) -> None:
    """`test_core.py` with a module that g++ compiled for a sanitizer, and its runtime loaded into Python first."""
    package = tmp_path / "expertd"
    package.mkdir()
    for path in (ROOT / "src" / "expertd").iterdir():
        if not path.name.startswith("_native."):
            (package / path.name).symlink_to(path.resolve())
    sources = [NATIVE / "bindings.cc", *part("base", "tokens")]
    build_library(package / f"_native{SUFFIX}", sources, *sanitizer(kind))
    # With the library that throws: the runtime looks for it once, at the start, to watch exceptions.
    preloaded = [run("g++", f"-print-file-name={name}").strip() for name in (RUNTIMES[kind], "libstdc++.so")]
    pytest_here = ("-m", "pytest", "-q", "--capture=no", "--noconftest", "-p", "no:cacheprovider", "-p", "no:asyncio")
    done = run(
        sys.executable,
        *pytest_here,
        "--override-ini=addopts=--import-mode=importlib",
        "--override-ini=filterwarnings=",
        "tests/native/test_core.py",
        LD_PRELOAD=" ".join(preloaded),
        PYTHONPATH=str(tmp_path),
        PYTHONMALLOC="malloc",
        ASAN_OPTIONS="detect_leaks=0",
        TSAN_OPTIONS="halt_on_error=1 report_signal_unsafe=0",
    )
    assert " passed" in done
