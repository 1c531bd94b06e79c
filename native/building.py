"""setuptools' build backend, with a compiler from PyPI where the machine has none; how the extension is compiled."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from origin import DATE, date
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  # the hooks that stay as they are

if TYPE_CHECKING:
    from pybind11.setup_helpers import Pybind11Extension

NATIVE = Path(__file__).parent
ZIG = "ziglang>=0.13"
# The oldest glibc that runs the Pythons that expertd supports; without a target zig compiles for this processor alone.
ZIG_TARGETS = {"x86_64": "x86_64-linux-gnu.2.17", "aarch64": "aarch64-linux-gnu.2.17"}
# No contraction to FMA, which would change sums. Nobody reads floating-point flags: loops become branchless without.
FLAGS = ["-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-pthread"]

PARTS = ("base", "tokens")
SERVER_PARTS = ("request", "lane", "call", "engine", "cuda") if sys.platform == "linux" else ()
"""What servers run on, with a face of its own each in native/bindings; callers on other systems do without.
No CUDA is needed to build it: its driver is looked for when a GPU is to compute."""

Settings = dict[str, str | list[str] | None]


def has_compiler() -> bool:
    """Whether the C++ compiler of $CXX, or else the one that Python was built with, is there."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    return shutil.which(shlex.split(command)[0]) is not None


HERE = platform.machine()
ARCH = os.environ.get("EXPERTD_ARCH", HERE)
"""The processor that a Linux wheel is for; for another than this machine's it is compiled by zig."""
if HERE != ARCH:
    if sys.platform != "linux" or ARCH not in ZIG_TARGETS:
        raise SystemExit(f"EXPERTD_ARCH is {ARCH!r}; wheels are built on Linux, for {' or '.join(ZIG_TARGETS)}")
    os.environ["_PYTHON_HOST_PLATFORM"] = f"linux-{ARCH}"
    os.environ["SETUPTOOLS_EXT_SUFFIX"] = str(sysconfig.get_config_var("EXT_SUFFIX")).replace(HERE, ARCH)

# Files have the same rights in every wheel, whoever builds it.
os.umask(0o022)
# Asked once: `extension` names zig in $CXX.
HAS_COMPILER = HERE == ARCH and has_compiler()
COMPILER = [] if HAS_COMPILER else [ZIG]


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *COMPILER]


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *COMPILER]


def build_wheel(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """The wheel's name. All that is in it has the commit's date."""
    if dated := date():
        os.environ[DATE] = dated
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def sources() -> list[Path]:
    """What the package is compiled from."""
    parts = [path for part in (*PARTS, *SERVER_PARTS) for path in sorted((NATIVE / part).glob("*.cc"))]
    faces = [NATIVE / "server_bindings.cc"] if SERVER_PARTS else []
    return [NATIVE / "bindings.cc", *faces, *parts]


def extension() -> Pybind11Extension:
    """`expertd._native`, compiled by zig where there is no other compiler."""
    from pybind11.setup_helpers import Pybind11Extension

    flags, link_flags = list(FLAGS), []
    if not HAS_COMPILER:
        # Debian's Python.h includes <ARCH-linux-gnu/pythonX/pyconfig.h>, where zig, with a target, does not look.
        flags += ["-idirafter", str(Path(sysconfig.get_path("include")).parent)]
        zig = shlex.join([sys.executable, "-m", "ziglang", "c++"])
        if sys.platform == "linux":
            zig += f" -target {ZIG_TARGETS[ARCH]}"
        os.environ.update(CC=zig, CXX=zig, LDSHARED=f"{zig} -shared", LDCXXSHARED=f"{zig} -shared")
        # zig compiles its own libraries with debug information, in which is the folder that it ran in.
        link_flags += ["-Wl,--strip-debug"] if sys.platform == "linux" else []
    root = NATIVE.parent
    return Pybind11Extension(
        "expertd._native",
        [str(path.relative_to(root)) for path in sources()],
        include_dirs=[str(NATIVE.relative_to(root))],
        depends=[
            str(path.relative_to(root))
            for path in (*sorted(NATIVE.rglob("*.h")), *sorted((NATIVE / "bindings").glob("*.cc")))
        ],
        define_macros=[("EXPERTD_SERVER", "1")] if SERVER_PARTS else [],
        extra_compile_args=flags,
        extra_link_args=link_flags,
        libraries=["dl"] if sys.platform == "linux" else [],
        cxx_std=20,
    )
