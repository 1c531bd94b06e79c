"""The device owner: one thread that alone calls the backend, fed from the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from expertd.kernels.backend import Backend, Partials, TokenBatch
from expertd.proto.errors import ServerFault

T = TypeVar("T")


class DeviceOwner:
    """Runs functions one after another on its own thread and resolves their futures on the event loop."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="device-owner", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end after the work that it already has."""
        self._work.put(None)

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run `function` on the device thread; its result or exception arrives in the future."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                result = function()
            except Exception as error:
                loop.call_soon_threadsafe(_reject, future, error)
            else:
                loop.call_soon_threadsafe(_resolve, future, result)

        self._work.put(work)
        return future

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """Results of merged requests, in the order in which they were given, with the batch's seconds by stage."""

    partials: tuple[Partials, ...]
    copy_in: float
    compute: float
    copy_out: float


def run_batch(
    backend: Backend, layer: int, requests: Sequence[TokenBatch], num_experts: int, reply_dtype: torch.dtype
) -> BatchOutcome:
    """Compute several requests as one device batch. Called on the device thread.

    Raises `ServerFault` when the pairs that the backend counted are not those that the requests asked for.
    """
    started = time.perf_counter()
    batch = backend.copy_in(requests)
    backend.synchronize()
    copied_in = time.perf_counter()
    computed = backend.execute(layer, batch)
    backend.synchronize()
    finished = time.perf_counter()
    merged = backend.copy_out(computed, reply_dtype)
    pairs = [_count_pairs(request.expert_ids, num_experts) for request in requests]
    expected = torch.stack(pairs).sum(dim=0)
    if not torch.equal(expected, merged.pairs.long()):
        raise ServerFault(f"layer {layer}: the device computed pairs {merged.pairs.tolist()}, not {expected.tolist()}")
    sums = torch.split(merged.sums, [request.num_tokens for request in requests])
    return BatchOutcome(
        partials=tuple(Partials(*part) for part in zip(sums, pairs, strict=True)),
        copy_in=copied_in - started,
        compute=finished - copied_in,
        copy_out=time.perf_counter() - finished,
    )


def _count_pairs(expert_ids: Tensor, num_experts: int) -> Tensor:
    return (expert_ids.reshape(-1) + 1).bincount(minlength=num_experts + 1)[1:]


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _reject(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
