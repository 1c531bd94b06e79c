"""Files that are read again when they change."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

Stamp: TypeAlias = tuple[tuple[int, int, int], ...]


def stamp_of(paths: Iterable[Path]) -> Stamp | None:
    """What changes when a file is rewritten, replaced or its link switched; None while one is missing."""
    try:
        stats = [path.stat() for path in paths]
    except OSError:
        return None
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
