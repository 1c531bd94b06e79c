"""How much the tests of this folder do: a short version, or with EXPERTD_CHAOS=full (`make chaos`) all of it."""

from __future__ import annotations

import os
from typing import TypeVar

from tests.chaos.load import Report

T = TypeVar("T")
FULL = os.environ.get("EXPERTD_CHAOS") == "full"


def scaled(full: T, short: T) -> T:
    return full if FULL else short


def hold(report: Report, name: str, least_calls: int) -> None:
    """Print the summary of a run, and fail unless it ran and nothing was violated."""
    print(f"\n{report.line(name)}")
    for message in report.messages[:5]:
        print(f"  error after {message}")
    assert report.violations == [], f"{len(report.violations)} violations: {report.violations[:5]}"
    assert report.right >= least_calls, f"{report.right} calls were answered; with fewer than {least_calls} nothing ran"
