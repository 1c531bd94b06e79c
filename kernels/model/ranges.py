"""Lists of layers and experts as people write them: "0-31,40"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence


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


def parse_shard(text: str) -> tuple[int, int]:
    """Read "2/8", the second of eight."""
    parts = re.fullmatch(r"(\d+)/(\d+)", text.strip(), re.ASCII)
    if parts is None or not 1 <= int(parts[1]) <= int(parts[2]):
        raise ValueError(f"{text!r} is not a shard such as 2/8, from 1/8 to 8/8")
    return int(parts[1]), int(parts[2])


def shard_of(experts: int, number: int, count: int) -> tuple[int, ...]:
    """The experts of shard `number`, from 1, of `count` as equal as can be."""
    return tuple(range(experts * (number - 1) // count, experts * number // count))


def format_ranges(numbers: Iterable[int]) -> str:
    """Write ascending integers the way `parse_ranges` reads them."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def describe_experts(experts: Mapping[int, Sequence[int]]) -> str:
    """By layer: "0-31", or where not all layers have the same "0-31 (layers 5-6: 0-30,77; layer 9: none)"."""
    layers: dict[str, list[int]] = {}
    for layer, owned in experts.items():
        layers.setdefault(format_ranges(owned) or "none", []).append(layer)
    if not layers:
        return "none"
    # Of those that are as common, the first layer's.
    usual = max(layers, key=lambda ranges: len(layers[ranges]))
    others = [
        f"layer{'s' if len(where) > 1 else ''} {format_ranges(where)}: {ranges}"
        for ranges, where in layers.items()
        if ranges != usual
    ]
    return f"{usual} ({'; '.join(others)})" if others else usual
