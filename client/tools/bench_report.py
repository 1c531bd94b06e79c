"""What `expertd bench serve` found, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from expertd.proto.codec import StageTimings

STAGES = StageTimings._fields


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


def print_table(rows: Sequence[Measurement], title: str) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    columns = ("tokens", "what", "callers", "calls", "p50 ms", "p99 ms", "GB/s", "tokens/s", *STAGES)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.tokens),
            row.what,
            str(row.callers),
            str(row.calls),
            f"{row.p50 * 1e3:.3f}",
            f"{row.p99 * 1e3:.3f}",
            f"{row.gigabytes_per_second:.3f}",
            f"{row.tokens_per_second:.0f}",
            *(f"{row.stages[stage] * 1e3:.3f}" if row.stages else "" for stage in STAGES),
        )
    Console(width=150).print(table)


def draw(rows: Sequence[Measurement], title: str, file: Path) -> None:
    """Write `rows` of the fewest callers to a PNG. Needs the extra `plot`."""
    from matplotlib.figure import Figure

    fewest = min(row.callers for row in rows if row.stages)
    chosen = [row for row in rows if not row.stages or row.callers == fewest]
    figure = Figure(figsize=(14, 5), layout="constrained")
    callers = f"{fewest} caller{'s' if fewest > 1 else ''}"
    figure.suptitle(f"{title}, {callers}; dashed: the same bytes without expertd; dotted: computing")
    latency, throughput = figure.subplots(1, 2)
    for name in dict.fromkeys(row.what for row in chosen):
        mine = [row for row in chosen if row.what == name]
        tokens = [row.tokens for row in mine]
        style = "o-" if mine[0].stages else "x--"
        (line,) = latency.plot(tokens, [row.p50 * 1e3 for row in mine], style, label=name)
        throughput.plot(tokens, [row.gigabytes_per_second for row in mine], style, label=name, color=line.get_color())
        if mine[0].stages:
            compute = [row.stages["compute"] * 1e3 for row in mine]
            latency.plot(tokens, compute, ":", color=line.get_color())
    for axes, label in ((latency, "p50 of a call, ms"), (throughput, "request and reply bytes, GB/s")):
        axes.set(xscale="log", yscale="log", xlabel="tokens a call", ylabel=label)
        sizes = sorted({row.tokens for row in chosen})
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*latency.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(file, format="png", dpi=120)
