"""Choosing the fastest of several configurations within a budget of time."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import cuda.tile as ct
import torch

from expertd.kernels.cutile.pipeline.table import BUDGET_SPENT, Choice, Table, encode

logger = logging.getLogger(__name__)

T = TypeVar("T")


class WrongResult(Exception):
    """A candidate computed something else than the reference."""


class Tuner:
    """Measures candidates within a budget of seconds and keeps its choices in a table."""

    def __init__(
        self,
        table: Table,
        budget_s: float,
        report: Callable[[str], None] = logger.info,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.table = table
        self._report = report
        self._clock = clock
        self._deadline = clock() + budget_s

    def best(self, kernel: str, shape_class: str, candidates: Sequence[T], measure: Callable[[T], float]) -> T:
        """The candidate for which `measure` gives the fewest microseconds, from the table where it is known.

        `measure` raises `WrongResult`, `cuda.tile.TileError` or `RuntimeError` for a candidate that must not be chosen;
        `torch.AcceleratorError` goes through, because after it nothing runs on the device any more. Without any
        measurement (no time left, or nothing works) the first candidate is returned, and not recorded.
        """
        known = self.table.choices.get(kernel, {}).get(shape_class)
        for candidate in candidates:
            if known is not None and known.complete and encode(candidate) == known.config:
                return candidate
        measured: list[tuple[float, int]] = []
        skipped = {}
        for index, candidate in enumerate(candidates):
            try:
                if self._clock() >= self._deadline:
                    raise TimeoutError(BUDGET_SPENT)
                microseconds = measure(candidate)
            except torch.AcceleratorError:
                raise
            except (WrongResult, ct.TileError, RuntimeError, TimeoutError) as error:
                skipped[json.dumps(encode(candidate))] = f"{type(error).__name__}: {error}".splitlines()[0]
                self._report(f"{kernel} {shape_class} {candidate}: skipped, {error}")
            else:
                measured.append((microseconds, index))
                self._report(f"{kernel} {shape_class} {candidate}: {microseconds:.1f} us")
        if not measured:
            return candidates[0]
        microseconds, index = min(measured)
        self.table.put(kernel, shape_class, Choice(encode(candidates[index]), round(microseconds, 1), skipped))
        return candidates[index]
