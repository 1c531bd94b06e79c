"""docs/modules.md, from the docstrings of the modules and the contracts of the rooms in pyproject.toml."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

from docs.generate.markdown import table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "modules.md"
PACKAGES = ("server", "client", "kernels", "proto")
HEAD = """\
# Modules

Written by `make docs` from the modules' docstrings. Rooms stand as in `[tool.importlinter]` of pyproject.toml: each
imports what is below it, never what is above; [architecture.md](architecture.md) says what they are for.
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [HEAD]
    for package in PACKAGES:
        parts.append(f"## {package}\n")
        for room in rooms(package):
            if rows := module_rows(ROOT / room):
                parts += (f"### {room}\n", table(("module", "what it is"), rows))
    return "\n".join(parts)


def rooms(package: str) -> Iterator[str]:
    """A package or room and the rooms in it, the highest first: `server`, `server/doctor`, ..."""
    yield package
    for layer in _layers(package):
        for name in layer.split(" | "):
            room = f"{package}/{name}"
            if (ROOT / room).is_dir():
                yield from rooms(room)


def module_rows(folder: Path) -> list[tuple[str, str]]:
    """Name and first line of the docstring of each module."""
    paths = sorted(path for path in folder.glob("*.py") if not path.name.endswith("_pb2.py"))
    return [(f"`{path.name}`", _summary(path)) for path in paths]


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if not docstring:
        raise SystemExit(f"{path} has no docstring")
    return docstring.split("\n")[0]


def _layers(container: str) -> list[str]:
    """The rooms of a package or room, the highest first; none where there is no contract about them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    wanted = [f"expertd.{container.replace('/', '.')}"]
    return next((contract["layers"] for contract in contracts if contract.get("containers") == wanted), [])


if __name__ == "__main__":
    PAGE.write_text(page())
