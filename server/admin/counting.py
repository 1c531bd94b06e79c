"""What becomes of updates, for metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from expertd.proto.base.errors import ExpertdError
from expertd.server.admin.holdings import Change, Holdings
from expertd.server.scheduling.generations import Generations
from expertd.server.telemetry.metrics import Metrics

OUTCOMES = ("ok", "cancelled", "invalid_argument", "aborted", "resource_exhausted", "unavailable", "internal")
"""Exported before the first update: without a zero to begin with, nobody sees the first one."""


def export(metrics: Metrics, holdings: Holdings) -> None:
    """Let scrapes see them, and what is held, where there is an administration."""
    for outcome in OUTCOMES:
        metrics.updates.labels(outcome)
    metrics.export(metrics.updates, metrics.updates_in_flight, metrics.update_seconds, metrics.update_bytes)
    metrics.export(metrics.generation_share, metrics.staged_bytes)
    metrics.updates_in_flight.set_function(lambda: holdings.busy)
    metrics.generation_share.set_function(lambda: _shares(holdings.generations))
    metrics.staged_bytes.set_function(lambda: sum(one.num_bytes for one in holdings.generations.all[1:]))


def _shares(generations: Generations) -> Iterator[tuple[tuple[str], tuple[float]]]:
    """Of calls, by fingerprint."""
    for generation in generations.all:
        share = generations.share if generation is generations.next else 1.0 - generations.share
        yield (generation.fingerprint,), (share,)


@contextlib.contextmanager
def counted(metrics: Metrics) -> Iterator[Change]:
    """Around an update: what became of it, and what one that was carried out took."""
    change = Change()
    started, outcome = time.perf_counter(), "internal"
    try:
        yield change
        outcome = "ok"
        metrics.update_seconds.observe(time.perf_counter() - started)
    except (asyncio.CancelledError, GeneratorExit):
        # Who left after the switch did not hear of its end; it stays nevertheless.
        outcome = "ok" if change.switched else "cancelled"
        raise
    except ExpertdError as error:
        outcome = error.code.name.lower()
        raise
    finally:
        metrics.updates.labels(outcome).inc()
