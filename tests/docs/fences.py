"""Code fences of the documents, and what the documents say about running them.

A comment on the line before a fence says how it is run:

    <!-- runs until stopped -->      a server: started, waited for, stopped when the document ends
    <!-- run by tests/a/test_b.py -->  another test runs it
    <!-- not run: why -->

Every other fence in a shell's language or in Python is run as it stands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("client/examples/*/README.md")),
)
SHELL = ("sh", "shell", "bash", "console")
UNTIL_STOPPED = "runs until stopped"
_FENCE = re.compile(r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Fence:
    """One fence of one document."""

    line: int
    language: str
    code: str
    mark: str
    """What the comment before it says; empty without one."""

    @property
    def is_shell(self) -> bool:
        return self.language in SHELL

    @property
    def runs_here(self) -> bool:
        return (self.is_shell or self.language == "python") and self.mark in ("", UNTIL_STOPPED)

    @classmethod
    def all_of(cls, text: str) -> list[Self]:
        return [
            cls(text.count("\n", 0, found.start()) + 1, found["language"], found["code"], found["mark"] or "")
            for found in _FENCE.finditer(text)
        ]
