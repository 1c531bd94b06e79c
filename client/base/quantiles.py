"""Quantiles of latencies."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def quantile(values: Iterable[float], share: float) -> float:
    """The value that a `share` of all do not exceed; of few values the largest. `values` is not empty."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def p50_p99(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the value that 99 of 100 do not exceed; of fewer than 100 the largest. `values` is not empty."""
    return statistics.median(values), quantile(values, 0.99)
