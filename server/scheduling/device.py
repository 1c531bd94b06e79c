"""The device owner: one thread that alone calls the backend, fed from the event loop, and one that waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertd.kernels.numerics.backend import DeviceSeconds, Partials, TokenBatch, Underway
from expertd.proto.base.errors import ServerFault

S = TypeVar("S")
T = TypeVar("T")


class DeviceOwner:
    """Runs functions one after another on its own thread and resolves their futures on the event loop.

    A second thread waits for the batches that the first has started, so that the next one can start meanwhile.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._waits: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_run_all, args=(queue,), name=name, daemon=True)
            for name, queue in (("device-owner", self._work), ("device-waiter", self._waits))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the threads end after the work that they already have."""
        self._work.put(lambda: self._waits.put(None))
        self._work.put(None)

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run `function` on the device thread; its result or exception arrives in the future."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._work.put(lambda: None if future.cancelled() else _settle(future, function))
        return future

    def run(self, start: Callable[[], S], finish: Callable[[S], T], *, alone: bool = False) -> asyncio.Future[T]:
        """Run `start` on the device thread and `finish`, which waits for the device, on the other one.

        `alone`: nothing else waits for the device thread, so that it runs `finish` as well and no other is woken up.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def work() -> None:
            try:
                underway = start()
            except Exception as error:
                future.get_loop().call_soon_threadsafe(reject, future, error)
                return
            if alone:
                _settle(future, lambda: finish(underway))
            else:
                self._waits.put(lambda: _settle(future, lambda: finish(underway)))

        self._work.put(work)
        return future


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """Results of merged requests, in the order in which they were given, with what their batch took."""

    partials: tuple[Partials, ...]
    seconds: DeviceSeconds


def collect(layer: int, requests: Sequence[TokenBatch], num_experts: int, underway: Underway) -> BatchOutcome:
    """Wait for a batch and give each request its part.

    Raises `ServerFault` when the pairs that the backend counted are not those that the requests asked for.
    """
    pairs = [_count_pairs(request.expert_ids, num_experts) for request in requests]
    expected = reduce(np.add, pairs)
    computed = underway.result()
    if not np.logical_and.reduce(expected == computed.pairs.numpy()):
        raise ServerFault(
            f"layer {layer}: the device computed pairs {computed.pairs.tolist()}, not {expected.tolist()}"
        )
    return BatchOutcome(
        partials=tuple(
            Partials(sums, torch.from_numpy(counted)) for sums, counted in zip(computed.sums, pairs, strict=True)
        ),
        seconds=computed.seconds,
    )


def _run_all(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (work := queue.get()) is not None:
        work()
        # What the last batch holds, callers' memory among it, is not to wait for the next one.
        del work


def _settle(future: asyncio.Future[T], function: Callable[[], T]) -> None:
    """Run `function` and hand its outcome to the event loop of `future`."""
    try:
        result = function()
    except Exception as error:
        future.get_loop().call_soon_threadsafe(reject, future, error)
    else:
        future.get_loop().call_soon_threadsafe(_resolve, future, result)


def _count_pairs(expert_ids: Tensor, num_experts: int) -> npt.NDArray[np.int64]:
    return np.bincount(expert_ids.numpy().ravel() + 1, minlength=num_experts + 1)[1:]


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def reject(future: asyncio.Future[T], error: Exception) -> None:
    """Fail `future`, unless nobody waits for it any more or it has its outcome."""
    if not future.done():
        future.set_exception(error)
