"""Files that expertd writes: each appears whole or not at all, and what can be made again has a folder of its own."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where expertd keeps what it can make again: $XDG_CACHE_HOME/expertd or ~/.cache/expertd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertd"


def check_path(name: str, path: object) -> None:
    """Raise `TypeError`, saying what to give, for what is no `Path`."""
    if not isinstance(path, Path):
        raise TypeError(
            f"{name} is {path!r}, a {type(path).__name__}; give a pathlib.Path, such as Path({str(path)!r})"
        )


def check_writable(path: Path | None) -> None:
    """Raise `OSError` for a file that could not be written when it is time: before the work whose result it takes."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write a file of sorted keys. Raises `OSError`."""
    write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a file that readers see either as it was or complete. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes that write the same file at once must not share the one that is not complete.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
