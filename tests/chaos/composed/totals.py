"""What several seeds come to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from expertd.client.base.quantiles import p50_p99
from tests.chaos.composed.history import RIGHT, History


@dataclass(slots=True)
class Totals:
    """Of several seeds."""

    seeds: int = 0
    seconds: float = 0.0
    """Of load."""
    took: list[float] = field(default_factory=list)
    """Seconds of each call."""
    outcomes: Counter[str] = field(default_factory=Counter)
    coordinators: Counter[str] = field(default_factory=Counter)
    """Calls of each."""
    faults: Counter[str] = field(default_factory=Counter)
    strikes: int = 0
    repeats: float = 0.0
    violations: int = 0

    def add(self, history: History, strikes: int) -> None:
        self.seeds += 1
        self.seconds += max((call.ended for call in history.calls), default=0.0)
        self.took += [call.ended - call.began for call in history.calls]
        self.outcomes.update(call.outcome for call in history.calls)
        self.coordinators.update(call.coordinator for call in history.calls)
        self.faults.update(fault.kind for fault in history.faults)
        self.strikes += strikes
        self.repeats += sum(history.repeats.values())
        self.violations += len(history.violations())

    def line(self) -> str:
        p50, p99 = p50_p99(self.took or [0.0])
        calls = self.outcomes.total()
        return (
            f"{self.seeds} seeds: {calls} calls, {calls / max(self.seconds, 1e-9):.0f}/s, {self.violations} violations,"
            f" {calls - self.outcomes[RIGHT]} refused; p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.0f} ms, max"
            f" {max(self.took, default=0.0):.2f} s; {self.repeats:.0f} repeats, {self.faults.total()} faults,"
            f" {self.strikes} strikes of failpoints"
        )

    def kinds(self) -> str:
        """What there was of each kind."""
        counters = {"outcomes": self.outcomes, "coordinators": self.coordinators, "faults": self.faults}
        return "\n".join(
            f"  {name}: " + ", ".join(f"{count} {kind}" for kind, count in counter.most_common())
            for name, counter in counters.items()
        )
