"""What `expertd bench serve` found, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from expertd.proto.codec import StageTimings

STAGES = StageTimings._fields
WIDTH = 180


@dataclass(frozen=True, slots=True)
class Measurement:
    """Calls of one size by one number of callers, or the same bytes over a floor."""

    what: str
    """expertd with its transport, grpc echo, raw socket or memcpy."""
    tokens: int
    callers: int
    calls: int
    p50: float
    """Seconds."""
    p99: float
    gigabytes_per_second: float
    """Request and reply bytes of all callers over the wall time."""
    tokens_per_second: float
    stages: dict[str, float]
    """Median seconds in each stage of the server."""
    over_floor: float | None = None
    """`p50` over that of the same bytes without expertd and of computing; of one caller."""
    call_p50: float | None = None
    """Of the same request as calls straight through the transport; of one caller and one server."""
    call_over_floor: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One way of doing something, beside another."""

    transport: str
    what: str
    tokens: int
    calls: int
    p50: float
    """Seconds."""
    p99: float
    ratio: float
    """`p50` over that of what it is compared with."""
    parts: dict[str, float]
    """Median seconds of what it consists of."""


@dataclass(frozen=True, slots=True)
class Section:
    """Ways of doing the same."""

    name: str
    compared_with: str
    rows: Sequence[Comparison]


def print_calls(rows: Sequence[Measurement], title: str) -> None:
    columns = ("p50 ms", "p99 ms", "x floor", "call ms", "x floor", "GB/s", "tokens/s", *STAGES)
    table = _table(title, "tokens", "what", "callers", "calls", *columns)
    for row in rows:
        table.add_row(
            str(row.tokens),
            row.what,
            str(row.callers),
            str(row.calls),
            _milliseconds(row.p50),
            _milliseconds(row.p99),
            _ratio(row.over_floor),
            _milliseconds(row.call_p50),
            _ratio(row.call_over_floor),
            f"{row.gigabytes_per_second:.3f}",
            f"{row.tokens_per_second:.0f}",
            *(_milliseconds(row.stages.get(stage)) for stage in STAGES),
        )
    Console(width=WIDTH).print(table)


def print_section(section: Section) -> None:
    heading = f"{section.name}, x: p50 over that of {section.compared_with}"
    table = _table(heading, "transport", "tokens", "what", "calls", "p50 ms", "p99 ms", "x", "of it, ms")
    for row in section.rows:
        times = _milliseconds(row.p50), _milliseconds(row.p99)
        table.add_row(
            row.transport, str(row.tokens), row.what, str(row.calls), *times, _ratio(row.ratio), _parts(row.parts)
        )
    Console(width=WIDTH).print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _parts(parts: Mapping[str, float]) -> str:
    """Each of a few, or of many the median and the longest."""
    if len(parts) <= 3:
        return ", ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in parts.items())
    longest = max(parts, key=lambda name: parts[name])
    median = statistics.median(parts.values())
    return f"median of {len(parts)} {_milliseconds(median)}, {longest} {_milliseconds(parts[longest])}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
