"""What a caller with two micro-batches gains when it computes for one of them while servers compute the other."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from expertd.client.call.pending import PendingCall
from expertd.client.sync import SyncCoordinator
from expertd.client.tools.bench.report import Comparison
from expertd.client.tools.bench.servers import Way
from expertd.client.tools.bench.timing import compare, in_turn_here, repeat_here

COMPARED_WITH = "halves one after another"
SIDES = {"cpu": 128, "cuda": 1024}
"""Of the matrices that the caller multiplies: small enough for a length to be met, large enough to be little Python."""
CALIBRATION_SECONDS = 0.05


class CallerWork:
    """Products of matrices that take about so many seconds; on the CPU on the thread that calls it alone."""

    def __init__(self, way: Way, seconds: float) -> None:
        self._way = way
        self._matrix = torch.randn(SIDES[way.device.type], SIDES[way.device.type], device=way.device)
        self._products = 1
        # Beside whatever else the machine does, as the call that it is to take as long as.
        one = statistics.median(repeat_here(self, CALIBRATION_SECONDS)[0])
        self._products = max(1, round(seconds / one))
        self.seconds = statistics.median(repeat_here(self, seconds)[0])

    def __call__(self) -> None:
        for _ in range(self._products):
            torch.mm(self._matrix, self._matrix)
        self._way.settle()


class MicroBatches:
    """A batch of one layer in two halves, for each of which the caller also computes something."""

    def __init__(self, way: Way, moe: SyncCoordinator, tokens: int, caller_seconds: float | None) -> None:
        """`caller_seconds`: how long that takes; None for as long as a half's call."""
        self._moe = moe
        self._way = way
        model = moe.model
        top_k = model.num_experts_per_tok
        self._whole = torch.randn(tokens, model.hidden_size, device=way.device).bfloat16()
        self._ids = torch.rand(tokens, model.n_routed_experts).argsort(dim=1)[:, :top_k]
        self._weights = torch.rand(tokens, top_k)
        self._halves = slice(0, tokens // 2), slice(tokens // 2, tokens)
        for _ in range(2):
            times, _ = repeat_here(partial(self._call, self._halves[0]), 0.0)
        self._call_seconds = statistics.median(times)
        self._work = CallerWork(way, caller_seconds or self._call_seconds)

    def compare(self, seconds: float) -> list[Comparison]:
        """Every manner beside one after another."""
        calls = {
            COMPARED_WITH: self._one_after_another,
            "halves in turns": self._in_turns,
            "halves together": self._together,
            "the whole batch": self._at_once,
        }
        parts = {"call of a half": self._call_seconds, "caller for a half": self._work.seconds}
        return compare(self._way.transport, len(self._whole), in_turn_here(calls, seconds), parts)

    def _at_once(self) -> None:
        """No halves at all: a call of the whole batch, then what the caller computes for it."""
        self._call(slice(None))
        self._work()
        self._work()

    def _one_after_another(self) -> None:
        for half in self._halves:
            self._call(half)
            self._work()

    def _in_turns(self) -> None:
        """The servers have one half while the caller computes for the other."""
        for half in self._halves:
            pending = self._submit(half)
            self._work()
            self._collect(pending)

    def _together(self) -> None:
        """The servers have both halves while the caller computes for both."""
        pending = [self._submit(half) for half in self._halves]
        for one in pending:
            self._work()
            self._collect(one)

    def _submit(self, rows: slice) -> PendingCall:
        ids, weights = self._ids[rows], self._weights[rows]
        return self._moe.submit(self._moe.layers[0], self._whole[rows], topk_ids=ids, topk_weights=weights)

    def _collect(self, pending: PendingCall) -> Tensor:
        output = pending.result().output
        self._way.settle()
        return output

    def _call(self, rows: slice) -> None:
        self._collect(self._submit(rows))


async def measure_micro_batches(
    way: Way, sizes: Sequence[int], caller_seconds: float | None, seconds: float
) -> list[Comparison]:
    """Batches of so many tokens, on another thread, as a model's own loop would be."""

    def measure() -> list[Comparison]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with way.blocking() as moe:
                batches = [MicroBatches(way, moe, tokens, caller_seconds) for tokens in sizes]
                return [row for one in batches for row in one.compare(seconds)]
        finally:
            torch.set_num_threads(threads)

    return await asyncio.to_thread(measure)
