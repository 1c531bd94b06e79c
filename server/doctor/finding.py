"""What `expertd doctor` found: one line a check, with what to do where something is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One result; `fail` is what `expertd serve` would end on, `warn` what would hurt later."""

    level: Level
    check: str
    text: str


def ok(check: str, text: str) -> Finding:
    return Finding("ok", check, text)


def warn(check: str, text: str) -> Finding:
    return Finding("warn", check, text)


def fail(check: str, text: str) -> Finding:
    return Finding("fail", check, text)
