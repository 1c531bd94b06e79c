"""Native code that tests build by themselves, with g++: libraries, programs and modules, under sanitizers or not."""

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]
NATIVE = ROOT / "native"
FLAGS = (
    *("-std=c++20", "-g", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"),
    *("-ffp-contract=off", f"-I{NATIVE}"),
)
"""Of everything, so that one object serves many programs; ccache, where it is installed, has them for all processes."""
OWN_TYPES = '-DPYBIND11_COMPILER_TYPE="_expertd_tests"'
"""For pybind11: the classes of such a module are others than those of `expertd._native` in the same process."""
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def sanitizer(kind: str) -> tuple[str, ...]:
    """Options for `kind`, such as `thread`."""
    return ("-O1", f"-fsanitize={kind}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


SANITIZED = sanitizer("address,undefined")


def part(*names: str) -> list[Path]:
    """The sources of parts of the native core."""
    return [path for name in names for path in sorted((NATIVE / name).glob("*.cc"))]


def build(target: Path, sources: Sequence[Path], *options: str, link: Sequence[str] = ()) -> Path:
    """Compile `sources` with `options`, and link them to `target`."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(lambda source: _object(source, options), sources))
    subprocess.run(["g++", "-pthread", *options, *link, *map(str, objects), "-o", str(target)], check=True)
    return target


def build_library(target: Path, sources: Sequence[Path], *options: str) -> Path:
    """Compile `sources` to the shared library `target`."""
    return build(target, sources, *(options or ("-O1",)), link=["-shared"])


def build_cuda_extension(folder: Path, *options: str) -> ModuleType:
    """The executor, and an engine for it, behind `tests/native/cuda_extension.cc`, built and loaded once a process."""
    sources = part("base", "cuda", "engine", "lane", "request", "tokens")
    return build_extension("cuda_extension", [*sources, NATIVE / "bindings/cuda.cc"], folder, *options)


def build_extension(name: str, sources: Sequence[Path], folder: Path, *options: str) -> ModuleType:
    """The module of `tests/native/NAME.cc` and `sources`, built and loaded once a process."""
    if name not in sys.modules:
        target = build_library(folder / f"{name}{SUFFIX}", [*sources, ROOT / f"tests/native/{name}.cc"], *options)
        load(name, target)
    return sys.modules[name]


def load(name: str, target: Path) -> ModuleType:
    """The Python module `name`, which is the shared library `target`."""
    spec = spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _object(source: Path, options: tuple[str, ...]) -> Path:
    """Of `source`, for all that is built with these options."""
    target = _folder() / f"{abs(hash((source, options))):x}-{source.stem}.o"
    # pybind11 is for faces alone; their modules are others than the package's.
    faces = () if source.parent.parent == NATIVE and source.parent.name != "bindings" else _python_options()
    cache = ["ccache"] if shutil.which("ccache") else []
    subprocess.run([*cache, "g++", *FLAGS, *options, *faces, "-c", str(source), "-o", str(target)], check=True)
    return target


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="expertd-objects-"))


@functools.cache
def _python_options() -> tuple[str, ...]:
    return OWN_TYPES, f"-isystem{_pybind11()}", f"-isystem{sysconfig.get_path('include')}"


def _pybind11() -> Path:
    """Where pybind11's headers are: its own package's, or those that torch comes with."""
    for package in ("pybind11", "torch"):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent / "include"
    raise RuntimeError("neither pybind11 nor torch is installed")
