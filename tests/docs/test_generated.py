"""What `make docs` writes is what is committed."""

import json
import re
from pathlib import Path

import pytest

from docs.generate import configuration, models, modules, performance, rooms
from expertd.kernels.model.families import FAMILIES

STALE = "out of date: run 'make docs' and commit the result"


def test_the_configuration_reference_is_current() -> None:
    assert configuration.PAGE.read_text() == configuration.page(), STALE


def test_the_list_of_modules_is_current() -> None:
    assert modules.PAGE.read_text() == modules.page(rooms.contracts()), STALE


def test_the_picture_of_the_rooms_is_current() -> None:
    assert rooms.PICTURE.read_text() == rooms.picture(rooms.contracts()), STALE


def test_the_tables_of_models_are_current() -> None:
    text = models.PAGE.read_text()
    assert text == models.page(text), STALE


def test_a_page_without_marks_and_a_family_without_a_small_model_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no marks of 'families'"):
        models.page("# Models\n")
    monkeypatch.setattr(models, "FAMILIES", {**FAMILIES, "untested": FAMILIES["mixtral"]})
    with pytest.raises(SystemExit, match=r"differ in \['untested'\]"):
        models.families()


def test_every_module_is_listed() -> None:
    listed = [
        f"{folder}/{name}"
        for folder, table in re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", modules.PAGE.read_text(), re.M | re.S)
        for name in re.findall(r"^\| `(\S+)` \|", table, re.M)
    ]
    packages = ("server", "client", "kernels", "proto", "native", "docs/generate", "src/expertd")
    present = [path for package in packages for path in (rooms.ROOT / package).rglob("*.py")]
    assert sorted(name for name in listed if name.endswith(".py")) == sorted(
        str(path.relative_to(rooms.ROOT)) for path in present if not {"build", "node_modules"} & set(path.parts)
    )


def test_every_room_is_told_of() -> None:
    told = re.findall(r"^\| `(\S+)` \|", (rooms.ROOT / "docs" / "architecture.md").read_text(), re.M)
    rooms_there = re.findall(r"^## (\S+)$", modules.PAGE.read_text(), re.M)
    inner = ("kernels/cutile/", "docs/")
    assert sorted(told) == sorted({*(room for room in rooms_there if not room.startswith(inner)), "kernels/cutile"})


def test_a_module_that_does_not_say_what_it_is_is_named(tmp_path: Path) -> None:
    silent = tmp_path / "silent.py"
    silent.write_text("SILENT = True\n")
    with pytest.raises(SystemExit, match=r"silent\.py has no docstring"):
        modules.first_line(silent)
    header = tmp_path / "silent.h"
    header.write_text("#pragma once\n")
    with pytest.raises(SystemExit, match=r"silent\.h has no comment"):
        modules.first_line(header)


def test_the_performance_page_is_current() -> None:
    assert performance.PAGE.read_text() == performance.page(json.loads(performance.DATA.read_text())), STALE


def test_the_plot_shows_the_measurements(tmp_path: Path) -> None:
    measured = json.loads(performance.DATA.read_text())
    assert performance.digest(measured) in performance.PLOT.read_text(), STALE
    performance.draw(measured, tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert performance.digest(measured) in drawn
    for label, _ in performance.SERIES.values():
        assert label in drawn


def test_a_field_without_a_docstring_is_named() -> None:
    class Undocumented:
        told: int
        """What it is."""
        untold: int

    with pytest.raises(SystemExit, match=r"Undocumented\.untold has no docstring"):
        configuration.field_docstrings(Undocumented)
