"""Traces to look at, one for each bucket of a histogram, for scrapers that take OpenMetrics."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client.samples import Exemplar

TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-([0-9a-f]{2})(?:-.*)?")


class Exemplars:
    """The latest traced request of every bucket of every stage. One thread adds, any reads."""

    def __init__(self, bounds: Mapping[str, Sequence[float]]) -> None:
        """Upper `bounds` of the buckets by stage."""
        self._bounds = bounds
        self._latest: dict[str, dict[int, Exemplar]] = {stage: {} for stage in bounds}

    def add(self, traceparent: str, seconds: Mapping[str, float], ended: float) -> None:
        """A request that spent `seconds` in the stages and ended at a Unix time."""
        trace = trace_of(traceparent)
        if not trace:
            return
        for stage, value in seconds.items():
            self._latest[stage][bisect_left(self._bounds[stage], value)] = Exemplar({"trace_id": trace}, value, ended)

    def of(self, stage: str) -> dict[int, Exemplar]:
        """By index of their bucket."""
        return self._latest[stage].copy()


def trace_of(traceparent: str) -> str:
    """The id of a trace that is sampled, from W3C's `traceparent`; else empty."""
    found = TRACEPARENT.fullmatch(traceparent)
    return found[1] if found and int(found[2], 16) & 1 else ""
