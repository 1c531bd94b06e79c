"""A Debian for arm64 with Python, NumPy and pytest, made once; qemu runs its programs on any processor.

    python -m tests.support.native.arm64

makes it ahead of the test.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from expertd.kernels.weights.files import cache_folder
from tests.support.programs import debootstrap, find_program, made_once

ROOT = cache_folder() / "arm64"
PYTHON = "3.11"
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux2014_aarch64")


def run_python(*command: str, folder: Path, paths: Sequence[Path]) -> subprocess.CompletedProcess[str]:
    """What arm64's Python does in `folder` with `command`; it imports from `paths`, NumPy and pytest."""
    qemu = find_program("qemu-aarch64-static", package="qemu-user-static")
    root = _root()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(map(str, (*paths, root / "packages")))}
    command = (qemu, "-L", str(root), str(root / f"usr/bin/python{PYTHON}"), *command)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _root() -> Path:
    """Raises `CalledProcessError`. Skips where it cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to unpack a Debian for arm64")
    return made_once(ROOT, _make)


def _make() -> None:
    debootstrap(ROOT, "python3", "--foreign", "--arch=arm64")
    # Only what every Debian has is unpacked by itself before its own programs run.
    archives = ROOT / "var/cache/apt/archives"
    for archive in sorted([*archives.glob("*python3*"), *archives.glob("libexpat1*")]):
        content = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True).stdout
        # Its folder lib is a link here.
        subprocess.run(["tar", "-x", "--keep-directory-symlink", "-C", ROOT], input=content, check=True)
    wanted = [word for platform in PLATFORMS for word in ("--platform", platform)]
    wanted += ["--python-version", PYTHON, "--only-binary=:all:", "--target", str(ROOT / "packages")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted, "numpy", "pytest", "hypothesis"], check=True)


if __name__ == "__main__":
    _root()
