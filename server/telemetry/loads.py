"""How many (token, expert) pairs each owned expert got: since the start, and lately."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

HALF_LIFE = 60.0
"""Seconds after which a pair counts half in `lately` and `balance`."""
STEP = 1.0
"""Seconds within which pairs count alike, so that not every request pays for the ageing of what came before."""


class ExpertLoads:
    """Counts of every expert of every layer. Written by one thread; others may read, at worst between two requests."""

    def __init__(self, layers: Sequence[int], experts: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.experts = tuple(experts)
        self.pairs: npt.NDArray[np.int64] = np.zeros((len(layers), len(experts)), np.int64)
        """[layers, experts]: since the start."""
        self._aged_by = np.zeros(self.pairs.shape)
        self._aged_at = [-math.inf] * len(layers)
        self._rows = {layer: row for row, layer in enumerate(layers)}

    def add(self, layer: int, pairs: Sequence[int] | npt.NDArray[np.integer[Any]], now: float) -> None:
        """Count `pairs`, one number for each of `experts`, at the time `now` in seconds."""
        row = self._rows[layer]
        age = now - self._aged_at[row]
        if age >= STEP:
            self._aged_by[row] += (self.pairs[row] - self._aged_by[row]) * (1 - 0.5 ** (age / HALF_LIFE))
            self._aged_at[row] = now
        self.pairs[row] += pairs

    def by_expert(self) -> Iterator[tuple[tuple[int, int], int]]:
        """Layer and expert, and the pairs that it got since the start."""
        for layer, row in zip(self.layers, self.pairs.tolist(), strict=True):
            for expert, count in zip(self.experts, row, strict=True):
                yield (layer, expert), count

    def lately(self) -> npt.NDArray[np.float64]:
        """[layers, experts]: pairs of the last minutes, old ones counting less. Compare within a layer only."""
        return self.pairs - self._aged_by

    def balance(self) -> dict[int, float]:
        """Layer -> mean over largest load of its experts lately: 1 when all got the same, 1/experts when one got all.

        Layers that got nothing yet are left out.
        """
        lately = self.lately()
        largest = lately.max(axis=1)
        return {layer: float(lately[row].mean() / largest[row]) for layer, row in self._rows.items() if largest[row]}
