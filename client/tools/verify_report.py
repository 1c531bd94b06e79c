"""What `expertd verify` found about servers, for people and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertd.kernels.oracle.golden import Agreement, Bounds
from expertd.proto.codec import ShardInfo

SHOWN_FAULTS = 20
COLUMNS = ("layer", "experts", "relative error", "cosine", "gain", "gain of a block", "whole layer", "verdict")


@dataclass(frozen=True, slots=True)
class Report:
    """What was found about one server."""

    address: str
    shard: ShardInfo
    bounds: Bounds
    agreements: tuple[Agreement, ...]

    @property
    def passed(self) -> bool:
        return not any(agreement.faults(self.bounds) for agreement in self.agreements)

    @property
    def experts(self) -> tuple[Agreement, ...]:
        return tuple(agreement for agreement in self.agreements if agreement.expert is not None)


def as_json(reports: Sequence[Report]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "passed": all(report.passed for report in reports),
        "servers": [
            {
                "address": report.address,
                "passed": report.passed,
                "model_fingerprint": report.shard.model_fingerprint,
                "backend": report.shard.backend,
                "device": report.shard.device,
                "bounds": dataclasses.asdict(report.bounds),
                "comparisons": [
                    dataclasses.asdict(agreement) | {"faults": agreement.faults(report.bounds)}
                    for agreement in report.agreements
                ],
            }
            for report in reports
        ],
    }


def print_report(report: Report, console: Console) -> None:
    """A row for each layer, then what is past its bound."""
    bounds = report.bounds
    console.print(f"{report.address}: {report.shard.backend} on {report.shard.device}")
    table = Table(
        *COLUMNS, title="The furthest of each layer's experts, with its number", title_justify="left", box=SIMPLE
    )
    for layer in dict.fromkeys(agreement.layer for agreement in report.agreements):
        table.add_row(*_row([agreement for agreement in report.agreements if agreement.layer == layer], bounds))
    console.print(table)
    console.print(
        f"bounds: relative error {bounds.relative_error:g}, gain 1 ± {bounds.gain:g},"
        f" gain of a block 1 ± {bounds.block_gain:g}"
    )
    faults = [(agreement, fault) for agreement in report.agreements for fault in agreement.faults(bounds)]
    for agreement, fault in faults[:SHOWN_FAULTS]:
        console.print(f"[red]layer {agreement.layer}, {_subject(agreement)}[/red]: {escape(fault)}")
    if len(faults) > SHOWN_FAULTS:
        console.print(f"and {len(faults) - SHOWN_FAULTS} more; --json has them all")
    worst = max(report.experts, key=lambda one: _distance(one.relative_error, 0.0))
    console.print(
        f"worst expert: {worst.expert} of layer {worst.layer}, relative error {worst.relative_error:.2e},"
        f" cosine {worst.cosine:.6f}, gain {worst.gain:.5f}"
    )
    wrong = len({(agreement.layer, agreement.expert) for agreement, _ in faults if agreement.expert is not None})
    verdict = "[green]OK[/green]" if report.passed else "[red]FAILED[/red]"
    console.print(f"{verdict}: {wrong} of {len(report.experts)} experts past a bound")


def _row(agreements: Sequence[Agreement], bounds: Bounds) -> tuple[str, ...]:
    experts = [agreement for agreement in agreements if agreement.expert is not None]
    whole = next(agreement for agreement in agreements if agreement.expert is None)
    error = max(experts, key=lambda one: _distance(one.relative_error, 0.0))
    cosine = max(experts, key=lambda one: _distance(one.cosine, 1.0))
    gain = max(experts, key=lambda one: _distance(one.gain, 1.0))
    block = max(experts, key=lambda one: _distance(one.block_gain, 1.0))
    return (
        str(error.layer),
        str(len(experts)),
        f"{error.relative_error:.1e} ({error.expert})",
        f"{cosine.cosine:.6f} ({cosine.expert})",
        f"{gain.gain:.5f} ({gain.expert})",
        f"{block.block_gain:.5f} ({block.expert})",
        f"{whole.relative_error:.1e}",
        "[red]FAILED[/red]" if any(agreement.faults(bounds) for agreement in agreements) else "ok",
    )


def _subject(agreement: Agreement) -> str:
    return "all experts at once" if agreement.expert is None else f"expert {agreement.expert}"


def _distance(value: float, right: float) -> float:
    """How far `value` is from `right`; NaN is furthest."""
    return math.inf if math.isnan(value) else abs(value - right)
