"""docs/modules.md: every module by its first line, room by room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from docs.generate.markdown import table
from docs.generate.rooms import ROOT, Layers, contracts

PAGE = ROOT / "docs" / "modules.md"
HEAD = """\
# Modules

Written by `make docs` from the first lines of the modules, room by room in the order of the contracts in
`pyproject.toml`: a room imports what is below it, never what is above ([architecture](architecture.md)).
"""
OTHERS = ("expertd.native", "expertd.docs.generate")
"""Folders of which no contract speaks."""


def page(of: dict[str, Layers]) -> str:
    """The whole page, in Markdown."""
    packages = ("expertd", *(name for layer in of[""] for name in layer if folder(name).is_dir()), *OTHERS)
    rooms = (room for package in packages for room in listed(package, of))
    return "\n".join((HEAD, *(f"## {name}\n\n{table(('module', 'what it is'), rows)}" for name, rows in rooms)))


def listed(room: str, of: dict[str, Layers]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The room's folder with a row for each of its modules, then the rooms in it."""
    order = [name for layer in of.get(room, ()) for name in layer]
    found = [path for path in folder(room).iterdir() if path.is_dir() or path.suffix in (".py", ".h", ".cc")]
    found.sort(key=lambda path: (order.index(path.stem) if path.stem in order else -1, path.name))
    rows = [(f"`{path.name}`", line) for path in found if path.is_file() and (line := first_line(path))]
    if rows:
        yield str(folder(room).relative_to(ROOT)), rows
    for path in found:
        # The links in src/expertd are packages of their own; a contract names all rooms there are.
        if path.is_dir() and not path.is_symlink() and (not order or path.name in order):
            yield from listed(f"{room}.{path.name}", of)


def folder(room: str) -> Path:
    return ROOT / "src" / "expertd" if room == "expertd" else ROOT / room.removeprefix("expertd.").replace(".", "/")


def first_line(path: Path) -> str:
    """What a module says of itself; a C++ file that is told of by its header says nothing."""
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text()))
        if not text:
            raise SystemExit(f"{path} has no docstring; write what it is in its first line")
        return text.splitlines()[0]
    line = path.read_text().partition("\n")[0]
    if path.suffix == ".h" and not line.startswith("// "):
        raise SystemExit(f"{path} has no comment in its first line; write there what it is")
    return line.removeprefix("// ") if line.startswith("// ") else ""


if __name__ == "__main__":
    PAGE.write_text(page(contracts()))
