"""What becomes of updates, for metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from expertd.proto.base.errors import ExpertdError
from expertd.server.telemetry.metrics import Metrics

OUTCOMES = ("ok", "cancelled", "invalid_argument", "aborted", "resource_exhausted", "unavailable", "internal")
"""Exported before the first update: without a zero to begin with, nobody sees the first one."""


def export(metrics: Metrics) -> None:
    """Let scrapes see them, where there is an administration."""
    for outcome in OUTCOMES:
        metrics.updates.labels(outcome)
    metrics.export(metrics.updates, metrics.updates_in_flight, metrics.update_seconds, metrics.update_bytes)


@contextlib.contextmanager
def counted(metrics: Metrics) -> Iterator[None]:
    """Around an update: what became of it, and what one that was carried out took."""
    started, outcome = time.perf_counter(), "internal"
    try:
        yield
        outcome = "ok"
        metrics.update_seconds.observe(time.perf_counter() - started)
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "cancelled"
        raise
    except ExpertdError as error:
        outcome = error.code.name.lower()
        raise
    finally:
        metrics.updates.labels(outcome).inc()
