"""Which commit is built, and when it was made: what lets a build be traced, and repeated bit for bit."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from setuptools.command.build_py import build_py

ROOT = Path(__file__).parents[1]
REVISION = "EXPERTD_REVISION"
"""The variable with the commit, for builds that have no repository around them."""
DATE = "SOURCE_DATE_EPOCH"
DIGITS = 12
"""Of the commit, in versions."""
UNKNOWN = 'REVISION = ""\n'
"""What the source says of it."""


def git(*arguments: str) -> str:
    """What `git` prints of this repository; empty where there is none, or no git."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def revision() -> str:
    """`DIGITS` of the commit, with `.dirty` for what differs from it; empty when nobody knows.

    Raises ValueError for a variable that holds none.
    """
    told = os.environ.get(REVISION) or git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    if told and not re.fullmatch("[0-9a-f]{12,40}(-dirty)?", told):
        raise ValueError(f"{REVISION} is {told!r}; it must be 12 to 40 digits of a commit, or these and -dirty")
    commit, _, dirty = told.partition("-")
    return commit[:DIGITS] + (f".{dirty}" if dirty else "")


def date() -> str:
    """Seconds since 1970 that everything in an archive is dated with: the commit's; empty when nobody knows."""
    return os.environ.get(DATE) or git("log", "-1", "--format=%ct")


class BuildModules(build_py):
    """The package's modules, with the commit in `version.py`."""

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        target, copied = super().build_module(module, module_file, package)
        if (package, module) == ("expertd", "version"):
            known = Path(module_file).read_text().replace(UNKNOWN, f'REVISION = "{revision()}"\n')
            Path(target).write_text(known)
        return target, copied
