"""How evenly servers are loaded: the figure for all layers, and the layers that are worst."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import nsmallest
from statistics import harmonic_mean, mean
from typing import TypeAlias

from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

WORST = 3
"""Layers that are told by name: a series for each of 58 would be most of what a coordinator tells."""
LEAST_PAIRS = 100.0
"""Of the mean server; of fewer, chance alone makes loads uneven."""
Loads: TypeAlias = Mapping[tuple[str, int], Mapping[str, float]]
"""Pairs of the last minutes by model and layer, and then by server."""


class Balance(Collector):
    """Asks coordinators for their loads at each scrape."""

    def __init__(self, loads: Callable[[], Iterable[Loads]]) -> None:
        self._loads = loads

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "expertd_coordinator_server_balance_ratio",
            "Mean over largest load of the servers that own experts of a layer, in pairs of the last minutes;"
            " of all layers the harmonic mean, and the least even ones.",
            labels=["layer"],
        )
        for layer, ratio in balance(self._loads()).items():
            family.add_metric([layer], ratio)
        yield family


def balance(loads: Iterable[Loads]) -> dict[str, float]:
    """What to tell of the `loads` that coordinators put on servers together: `all`, and the worst layers by number.

    The ratio of a layer is the part of its time that the mean server works, were all as fast: it ends with its most
    loaded one. Empty while there is too little to judge by.
    """
    known = {
        key: mean(pairs.values()) / max(pairs.values())
        for key, pairs in _together(loads).items()
        if mean(pairs.values()) >= LEAST_PAIRS
    }
    if not known:
        return {}
    layers: dict[str, float] = {}
    for (_, layer), ratio in known.items():
        # Of layers of several models that have the same number, the worse one.
        layers[str(layer)] = min(ratio, layers.get(str(layer), ratio))
    worst = nsmallest(WORST, layers, key=layers.__getitem__)
    return {"all": harmonic_mean(list(known.values())), **{layer: layers[layer] for layer in worst}}


def _together(loads: Iterable[Loads]) -> dict[tuple[str, int], dict[str, float]]:
    sums: dict[tuple[str, int], dict[str, float]] = {}
    for one in loads:
        for key, by_server in one.items():
            known = sums.setdefault(key, {})
            for server, pairs in by_server.items():
                known[server] = known.get(server, 0.0) + pairs
    return sums
