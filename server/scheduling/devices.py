"""What a server's devices tell of themselves: metrics, and what pages show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from expertd._native import Tally
from expertd.server.scheduling.node import Node
from expertd.server.telemetry.metrics import Metrics

STAGES = ("copy_in", "compute", "copy_out")


def export(metrics: Metrics, node: Node, tally: Tally) -> None:
    """Have scrapes ask; what several devices alone have is there where there are several."""
    metrics.device_busy.set_function(lambda: _busy(node, tally))
    if len(node.devices) == 1:
        return
    metrics.device_stages.set_function(
        lambda: (
            ((number, stage), (seconds,))
            for number, record in _records(node).items()
            for stage, seconds in zip(STAGES, record[2:], strict=True)
        )
    )
    metrics.device_failures.set_function(lambda: (((n,), (record[1],)) for n, record in _records(node).items()))
    metrics.device_lost.set_function(lambda: (((one.number,), (int(one.lost is not None),)) for one in node.devices))
    metrics.device_adding.set_function(
        lambda: [((), (0.0 if node.executor is None else node.executor.adding_seconds,))]
    )
    metrics.export(metrics.device_stages, metrics.device_failures, metrics.device_lost, metrics.device_adding)


def devices_of(node: Node, health: Mapping[int, str]) -> list[dict[str, Any]]:
    """For pages: each device with its state, the seconds that it computed, and how it says that it is."""
    records = _records(node)
    return [
        {
            "number": one.number,
            "name": one.backend.device,
            "lost": one.lost,
            "health": health.get(one.number),
            "busy_seconds": records[one.number][3] if one.number in records else None,
        }
        for one in node.devices
    ]


def _records(node: Node) -> dict[int, tuple[int, int, float, float, float]]:
    if node.executor is None:
        return {}
    return {one.number: record for one, record in zip(node.devices, node.executor.records(), strict=True)}


def _busy(node: Node, tally: Tally) -> Iterator[tuple[tuple[int], tuple[float]]]:
    if len(node.devices) == 1:
        yield (node.devices[0].number,), (tally.busy_seconds,)
    for number, record in _records(node).items():
        yield (number,), (record[3],)
