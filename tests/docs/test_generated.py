"""What `make docs` writes is what is committed."""

import json
from pathlib import Path

import pytest

from docs.generate import configuration, modules, performance

STALE = "out of date: run 'make docs' and commit the result"


def test_the_configuration_reference_is_current() -> None:
    assert configuration.PAGE.read_text() == configuration.page(), STALE


def test_the_list_of_modules_is_current() -> None:
    assert modules.PAGE.read_text() == modules.page(), STALE


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
