"""The compiler of the kernels, and with which ones the shipped choices were measured."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

MEASURED = Path(__file__).parent / "tuned" / "toolchains.json"
"""A list of {cuda_tile, tileiras}: versions with which every shipped table was measured."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Versions of cuda-tile and of its compiler; "unknown" where the compiler does not tell."""

    cuda_tile: str
    tileiras: str

    def __str__(self) -> str:
        return f"cuda-tile {self.cuda_tile} with tileiras {self.tileiras}"

    @classmethod
    def detect(cls) -> Toolchain:
        return cls(importlib.metadata.version("cuda-tile"), _tileiras_version())

    @property
    def measured(self) -> bool:
        return self in measured_toolchains()

    @property
    def advice(self) -> str:
        """What to do about one that was not measured: others were 3 times slower in places, and said nothing."""
        known = " or ".join(str(toolchain) for toolchain in measured_toolchains())
        return f"{self} was not measured with these kernels, and may be slower: install {known}, or run 'expertd tune'"


@functools.cache
def measured_toolchains() -> tuple[Toolchain, ...]:
    return tuple(Toolchain(**entry) for entry in json.loads(MEASURED.read_text()))


def output(*command: str) -> str:
    """What a command prints; "unknown" where it is missing or fails, so that its absence is a machine of its own."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _tileiras_version() -> str:
    try:
        return importlib.metadata.version("nvidia-cuda-tileiras")
    except importlib.metadata.PackageNotFoundError:
        found = re.search(r"\bV(\d+\.\d+\.\d+)", output("tileiras", "--version"))
        return found[1] if found else "unknown"
