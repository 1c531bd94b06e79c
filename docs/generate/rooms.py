"""docs/images/rooms.svg: the rooms of the packages, from the contracts that import-linter keeps."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
Layers: TypeAlias = tuple[tuple[str, ...], ...]
"""Rooms, the top ones first; what stands side by side does not know each other."""
WIDTH, MARGIN, STEP, TITLE = 960, 12, 28, 30
STYLE = """
    .page { fill: #ffffff; stroke: #d0d7de; }
    rect.panel { fill: #f6f8fa; stroke: #8c959f; }
    rect.room { fill: #ddf4ff; stroke: #54aeff; }
    text { font: 13px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328; }
    text.panel { font-weight: 600; }
    text.inner { font-size: 11px; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117; stroke: #3d444d; }
      rect.panel { fill: #151b23; stroke: #656c76; }
      rect.room { fill: #10233d; stroke: #1f6feb; }
      text { fill: #f0f6fc; }
    }
"""


def contracts() -> dict[str, Layers]:
    """The layers of each container: of "" the packages, of a package its rooms, of some rooms their own."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return {
        container: tuple(tuple(name.strip() for name in layer.split("|")) for layer in contract["layers"])
        for contract in linter["contracts"]
        if contract["type"] == "layers"
        for container in contract.get("containers", [""])
    }


def picture(of: dict[str, Layers]) -> str:
    """The packages above each other, and in each its rooms."""
    drawn, top = [], MARGIN
    for layer in of[""]:
        height = TITLE + STEP * max(len(of.get(package, ())) for package in layer)
        drawn += [
            shape
            for package, left, width in side_by_side(layer, MARGIN, WIDTH - 2 * MARGIN)
            for shape in (
                *box("panel", package, left, top, width, height),
                *rooms(package, of, left + MARGIN, top + TITLE, width - 2 * MARGIN),
            )
        ]
        top += height + MARGIN
    shapes = "\n".join(f"  {shape}" for shape in drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}" role="img"'
        ' aria-labelledby="title">\n  <title id="title">The rooms of expertd: each imports what is below it</title>\n'
        f'  <style>{STYLE}  </style>\n  <rect class="page" width="{WIDTH}" height="{top}"/>\n{shapes}\n</svg>\n'
    )


def rooms(package: str, of: dict[str, Layers], left: int, top: int, width: int) -> Iterator[str]:
    for row, layer in enumerate(of.get(package, ())):
        for name, begin, wide in side_by_side(layer, left, width):
            inner = ", ".join(" | ".join(names) for names in of.get(f"{package}.{name}", ()))
            kind, label = ("room inner", f"{name}: {inner}") if inner else ("room", name)
            yield from box(kind, label, begin, top + row * STEP, wide, STEP - 6)


def side_by_side(names: tuple[str, ...], left: int, width: int) -> list[tuple[str, int, int]]:
    """Each name with where it begins and how wide it is."""
    each = (width - MARGIN * (len(names) - 1)) // len(names)
    return [(name, left + place * (each + MARGIN), each) for place, name in enumerate(names)]


def box(kind: str, label: str, left: int, top: int, width: int, height: int) -> tuple[str, str]:
    return (
        f'<rect class="{kind}" x="{left}" y="{top}" width="{width}" height="{height}" rx="4"/>',
        f'<text class="{kind}" x="{left + width // 2}" y="{top + 16}" text-anchor="middle">{label}</text>',
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(contracts()))
