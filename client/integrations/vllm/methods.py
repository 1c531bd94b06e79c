"""The one way in which the plug-in comes between vLLM and a method of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:  # noqa: ANN401
    """Have `around(original, self, ...)` in place of a method of vLLM's, once."""
    original = getattr(owner, name)
    if getattr(original, "by_expertd", False):
        return
    method: Any = functools.wraps(original)(lambda *given, **named: around(original, *given, **named))
    method.by_expertd = True
    setattr(owner, name, method)
