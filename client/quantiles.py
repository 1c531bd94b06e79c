"""The two numbers by which latencies are reported."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def p50_p99(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the value that 99 of 100 do not exceed; of fewer than 100 the largest. `values` is not empty."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
