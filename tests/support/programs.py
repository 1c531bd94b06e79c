"""Programs that tests run; a skip says where to get them, and in CI, which installs them, it is a failure."""

import fcntl
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from expertd.kernels.weights.files import cache_folder


def find_program(*names: str, package: str) -> str:
    """The first of `names` that is installed, or a skip that names the Debian package."""
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    pytest.skip(f"{names[0]} is not installed (Debian: apt-get install {package})")


def node_modules(manifest: Path) -> Path:
    """The packages of a package.json, installed once for every content of it, or a skip when they cannot be had."""
    content = manifest.read_bytes()
    folder = cache_folder() / "node" / hashlib.sha256(content).hexdigest()[:16]
    if not (folder / "complete").exists():
        npm = find_program("npm", package="npm")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_bytes(content)
        done = subprocess.run([npm, "install", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"npm cannot install {manifest}: {done.stderr}")
        (folder / "complete").touch()
    return folder / "node_modules"


def made_once(folder: Path, make: Callable[[], None]) -> Path:
    """`folder`, which `make` fills, for this and all later runs; who comes while another makes it waits.

    Raises what `make` does, and then begins anew the next time.
    """
    complete = folder / ".complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make()
            complete.touch()
    return folder


def debootstrap(folder: Path, packages: str, *options: str) -> None:
    """Put Debian's smallest system with `packages` into `folder`, from where this machine has its own.

    Raises `CalledProcessError`, whose `output` says why.
    """
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    mirror = re.search(r"^URIs:\s*(\S+)", sources.read_text() if sources.exists() else "", re.MULTILINE)
    program = find_program("debootstrap", package="debootstrap")
    command = [program, "--variant=minbase", f"--include={packages}", *options, "bookworm", str(folder)]
    command += mirror.groups() if mirror else ()
    subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
