"""How many (token, expert) pairs each expert got: since the start, and lately."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

HALF_LIFE = 60.0
"""Seconds after which a pair counts half in `lately` and `balance`."""
STEP = 1.0
"""Seconds within which pairs count alike, so that not every request pays for the ageing of what came before."""


class ExpertLoads:
    """Counts of every expert of every layer of the model. Any thread may bring them up to date and read."""

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self.layers = tuple(layers)
        self.num_experts = num_experts
        self.owned: Mapping[int, Sequence[int]] = {layer: range(num_experts) for layer in layers}
        """The experts of each layer that are shown: those of this server."""
        self.pairs: npt.NDArray[np.int64] = np.zeros((len(layers), num_experts), np.int64)
        """[layers, experts]: since the start."""
        self._aged_by = np.zeros(self.pairs.shape)
        self._aged_at = [-math.inf] * len(layers)
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._updating = threading.Lock()

    def update(self, pairs: npt.NDArray[np.int64], now: float) -> None:
        """Bring the counts to `pairs` [layers, experts] since the start, at the time `now` in seconds."""
        with self._updating:
            more = pairs - self.pairs
            for row in np.flatnonzero(more.any(axis=1)):
                self.add(self.layers[row], more[row], now)

    def add(self, layer: int, pairs: Sequence[int] | npt.NDArray[np.integer[Any]], now: float) -> None:
        """Count `pairs`, one number for each expert, at the time `now` in seconds."""
        row = self._rows[layer]
        age = now - self._aged_at[row]
        if age >= STEP:
            self._aged_by[row] += (self.pairs[row] - self._aged_by[row]) * (1 - 0.5 ** (age / HALF_LIFE))
            self._aged_at[row] = now
        self.pairs[row] += pairs

    def by_expert(self) -> Iterator[tuple[tuple[int, int], int]]:
        """Layer and expert, and the pairs that it got since the start."""
        for layer, experts in self.owned.items():
            counts = self.pairs[self._rows[layer]].tolist()
            for expert in experts:
                yield (layer, expert), counts[expert]

    def lately(self) -> npt.NDArray[np.float64]:
        """[layers, experts]: pairs of the last minutes, old ones counting less. Compare within a layer only."""
        return self.pairs - self._aged_by

    def balance(self) -> dict[int, float]:
        """Layer -> mean over largest load of its experts lately: 1 when all got the same, 1/experts when one got all.

        Layers that got nothing yet are left out.
        """
        lately = self.lately()
        rows = {layer: lately[self._rows[layer], list(experts)] for layer, experts in self.owned.items() if experts}
        return {layer: float(row.mean() / row.max()) for layer, row in rows.items() if row.any()}

    def tables(self) -> dict[str, Any]:
        """As JSON: `layers` and `experts` that are shown, and for each layer what each of the experts got since the
        start (`pairs`) and `lately`, null where the layer has it not; the `balance` of each layer."""
        experts = sorted(set().union(*self.owned.values()))

        def table(values: npt.NDArray[Any]) -> list[list[float | None]]:
            rows = {layer: values[self._rows[layer]].tolist() for layer in self.owned}
            return [
                [rows[layer][expert] if expert in owned else None for expert in experts]
                for layer, owned in ((layer, set(experts)) for layer, experts in self.owned.items())
            ]

        return {
            "layers": list(self.owned),
            "experts": experts,
            "pairs": table(self.pairs),
            "lately": table(self.lately().round(3)),
            "balance": self.balance(),
        }
