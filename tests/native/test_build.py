"""How the native core is built: with a compiler of the machine or PyPI's, for other machines, and under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

from tests.support.native.build import NATIVE, ROOT, SUFFIX, build_library, part, sanitizer

PORTABLE = part("base", "tokens")
SOURCES = [NATIVE / "bindings.cc", NATIVE / "bindings/cuda.cc", *PORTABLE, *part("cuda")]
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-ffp-contract=off", f"-I{NATIVE}"]
PYTHON = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
RUNTIMES = {"address,undefined": "libasan.so", "thread": "libtsan.so"}


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the package is built from, and nothing that was built before."""
    folder = tmp_path / "expertd"
    names = ["client", "kernels", "native", "proto", "server", "src"]
    names += ["LICENSE", "README.md", "pyproject.toml", "setup.py"]
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    folder.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=built)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


BUILD = """
import building
wanted = building.get_requires_for_build_wheel()
assert [name for name in wanted if name.startswith("ziglang")], wanted
assert building.get_requires_for_build_editable() == wanted
print(building.build_wheel("dist"))
"""
USE = """
import _native
assert _native.crc32c(b"123456789") == 0xE3069283
print(_native.instruction_set())
"""


def test_a_wheel_is_built_without_a_compiler(checkout: Path, tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path / "nothing"), "PYTHONPATH": "native", "HOME": str(tmp_path)}
    command = (sys.executable, "-c", BUILD)
    built = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    (wheel,) = (checkout / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "wheel", "zip")
    package = tmp_path / "wheel" / "expertd"
    assert {path.name for path in package.glob("_native*")} == {"_native.pyi", f"_native{SUFFIX}"}
    assert run(sys.executable, "-c", USE, PYTHONPATH=str(package)).strip()
    # Compiled for this processor's family, not for this processor: glibc and libraries that every Linux has.
    needed = run("readelf", "--version-info", str(package / f"_native{SUFFIX}"))
    versions = {word for word in needed.split() if word.startswith("GLIBC_2.")}
    assert max(int(word.split(".")[1]) for word in versions) <= 17


@pytest.mark.parametrize("target", ["aarch64-linux-gnu.2.17", "aarch64-macos", "x86_64-macos"])
def test_other_machines_can_have_it(target: str, tmp_path: Path) -> None:
    """Beside x86-64 with Linux, whose wheel is made above."""
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-O0", *FLAGS, *PYTHON, "-c"]

    def compile_one(source: Path) -> None:
        run(*zig, str(source), "-o", str(tmp_path / f"{source.stem}.o"))

    # Python's headers here are Linux's.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(compile_one, SOURCES if "linux" in target else PORTABLE))


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
