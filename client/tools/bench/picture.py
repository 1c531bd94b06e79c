"""What `expertd bench serve` found, as a picture. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from expertd.client.tools.bench.report import Measurement, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_calls(rows: Sequence[Measurement], title: str, file: Path) -> None:
    """Write `rows` of the fewest callers to a PNG."""
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


def draw_sections(sections: Sequence[Section], title: str, file: Path) -> None:
    """Write the ratios of all `sections` to a PNG, one below the other."""
    from matplotlib.figure import Figure

    heights = [2 + len(section.rows) for section in sections]
    figure = Figure(figsize=(10, 0.3 * sum(heights) + 1), layout="constrained")
    figure.suptitle(title)
    places = figure.subplots(len(sections), 1, squeeze=False, height_ratios=heights)
    for axes, section in zip(places.flat, sections, strict=True):
        _draw_ratios(axes, section)
    figure.savefig(file, format="png", dpi=120)


def _draw_ratios(axes: Axes, section: Section) -> None:
    names = [f"{row.transport}, {row.tokens} token{'s' if row.tokens > 1 else ''}: {row.what}" for row in section.rows]
    bars = axes.barh(range(len(names)), [row.ratio for row in section.rows])
    axes.bar_label(bars, [f"{row.ratio:.2f} ({row.p50 * 1e3:.2f} ms)" for row in section.rows], padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(right=1.3 * max(row.ratio for row in section.rows))
    axes.margins(y=0.02)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(title=section.name, xlabel=f"p50 over that of {section.compared_with}")
