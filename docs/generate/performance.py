"""docs/performance.md and its plot, from what `expertd bench kernels --json` wrote."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from docs.generate.markdown import table

DOCS = Path(__file__).parents[1]
DATA = DOCS / "data" / "kernels-h200.json"
PAGE = DOCS / "performance.md"
PLOT = DOCS / "images" / "kernels.svg"
TEXT = """\
# Performance

Written by `make docs` from [{data}](data/{data}), in the form that `expertd bench kernels --json` writes. How it was
measured, what was tried and everything else that was timed: [measurements.md](measurements.md).

`expertd bench kernels` measures this on your GPU. With `--peers` it times others' kernels on the same batches, too,
where their packages are installed: DeepGEMM's two grouped products (of rows that are sorted and padded before), and the
whole layer of SGLang and of vLLM, which quantise tokens themselves; it says which are missing. On Blackwell (sm_100,
sm_120) kernels are chosen from what the compiler shows: none was measured.

One layer's routed experts on one server: from unsorted FP8 tokens with expert ids and weights to BF16 sums; 32 local
experts of 256, H 7168, I 2048, top 8. {gpu}, which in that run read {read:.2f} TB/s and did {rate:.0f} TFLOP/s in
BF16. Times are medians in microseconds of device time; repeated, the longer ones differ by up to 8%.

![Time of a layer against tokens of a batch](images/{plot})

{table}
- *pairs* are those (token, expert) pairs of the batch whose expert is on this server. *uniform* chooses experts with
  equal chances, *zipf* with chances of 1/rank; *one* sends every token to one expert.
- *fast* is what is served by default: FP8 products. *invariant* is the same with `--batch-invariant`, *dequant* the
  more exact `--pipeline dequant`, *torch* plain torch operations, expert by expert.
- *floor* is the larger of the bytes that must be read and written at that bandwidth and the FLOPs at twice that rate.
"""
SERIES = {
    "torch": ("plain torch, expert by expert", "#8a8f98"),
    "dequant": ("--pipeline dequant", "#d97706"),
    "fast": ("fast (default)", "#2563eb"),
    "floor": ("floor: bytes or FLOPs", "#16a34a"),
}


def page(measured: dict[str, Any]) -> str:
    """The whole page, in Markdown."""
    titles = (
        "routing",
        "tokens",
        "pairs",
        "fast",
        "of floor",
        "invariant",
        "dequant",
        "torch",
        "torch / fast",
        "floor",
    )
    return TEXT.format(
        data=DATA.name,
        plot=PLOT.name,
        gpu=measured["gpu"],
        read=measured["read_bytes_per_s"] / 1e12,
        rate=measured["bf16_flops_per_s"] / 1e12,
        table=table(titles, map(_cells, measured["rows"])),
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["routing"],
        str(row["tokens"]),
        str(row["pairs"]),
        _number(row["fast"]),
        f"{row['floor'] / row['fast']:.0%}",
        _number(row["fast_invariant"]),
        _number(row["dequant"]),
        _number(row["torch"]),
        "" if _missing(row["torch"]) else f"{row['torch'] / row['fast']:.0f}x",
        _number(row["floor"]),
    )


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def draw(measured: dict[str, Any], file: Path) -> None:
    """The layer's time against tokens, uniform routing; the SVG's description is `digest(measured)`."""
    rows = [row for row in measured["rows"] if row["routing"] == "uniform"]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": PLOT.name, "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for name, (label, color) in SERIES.items():
            known = [row for row in rows if not _missing(row[name])]
            style = ":" if name == "floor" else "-"
            tokens, times = [row["tokens"] for row in known], [row[name] for row in known]
            axes.plot(tokens, times, style, marker="o", markersize=4, color=color, label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens of a batch", ylabel="microseconds a layer")
        axes.set_xticks([row["tokens"] for row in rows], [str(row["tokens"]) for row in rows])
        axes.minorticks_off()
        axes.set_title(f"32 experts on one {measured['gpu']}, uniform routing", fontsize=11)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
        figure.savefig(file, metadata={"Date": None, "Description": digest(measured)})


def digest(measured: dict[str, Any]) -> str:
    """Tells one set of measurements from another."""
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    measured = json.loads(DATA.read_text())
    PAGE.write_text(page(measured))
    draw(measured, PLOT)
