"""Lists of layers and experts as people write them: "0-31,40"."""

from __future__ import annotations

import re
from collections.abc import Iterable


def parse_ranges(text: str) -> tuple[int, ...]:
    """Read "0-31,40" as ascending distinct integers."""
    numbers: set[int] = set()
    for part in text.split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        if span is None:
            raise ValueError(f"{part!r} is not a number or a range such as 0-31")
        low, high = int(span[1]), int(span[2] or span[1])
        if low > high:
            raise ValueError(f"range {part!r} runs backwards")
        if high >= 1 << 20:
            raise ValueError(f"{high} is out of any model's range")
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def format_ranges(numbers: Iterable[int]) -> str:
    """Write ascending integers the way `parse_ranges` reads them."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
