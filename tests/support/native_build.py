"""Native code that tests build by themselves, with g++: a fake driver, the executor and the engine."""

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def build_library(target: Path, sources: Sequence[Path], *options: str) -> Path:
    """Compile `sources` to the shared library `target`."""
    subprocess.run(["g++", *FLAGS, f"-I{ROOT / 'native'}", *options, *map(str, sources), "-o", str(target)], check=True)
    return target


def build_cuda_extension(folder: Path, *options: str) -> ModuleType:
    """The executor behind `tests/native/cuda_extension.cc`, built and loaded once a process."""
    sources = [*sorted((ROOT / "native/cuda").glob("*.cc")), ROOT / "native/bindings/cuda.cc"]
    return build_extension("cuda_extension", sources, folder, *options)


def build_engine_extension(folder: Path, *options: str) -> ModuleType:
    """The engine behind `tests/native/engine_extension.cc`, built and loaded once a process."""
    parts = [path for part in ("engine", "request") for path in sorted((ROOT / "native" / part).glob("*.cc"))]
    base = [ROOT / "native/base" / name for name in ("crc32c.cc", "instructions.cc")]
    return build_extension("engine_extension", [*parts, *base, ROOT / "native/bindings/engine.cc"], folder, *options)


def build_extension(name: str, sources: Sequence[Path], folder: Path, *options: str) -> ModuleType:
    """The module of `tests/native/NAME.cc` and `sources`, built and loaded once a process."""
    if name in sys.modules:
        return sys.modules[name]
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = (_pybind11(), Path(sysconfig.get_path("include")))
    build_library(
        target,
        [*sources, ROOT / f"tests/native/{name}.cc"],
        "-fvisibility=hidden",
        *(option for include in includes for option in ("-isystem", str(include))),
        *options,
    )
    spec = spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _pybind11() -> Path:
    """Where pybind11's headers are: its own package's, or those that torch comes with."""
    for package in ("pybind11", "torch"):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent / "include"
    raise RuntimeError("neither pybind11 nor torch is installed")
