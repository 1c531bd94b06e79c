"""The device owner: one thread that alone calls the backend, and one that waits for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from expertd._native import Batch, CallbackExecutor
from expertd.kernels.numerics.backend import Backend, TokenBatch, Underway
from expertd.proto.codec import DTYPES

T = TypeVar("T")
STOP_SECONDS = 0.5
"""For threads to end; one whose device hangs never does."""
Submit: TypeAlias = Callable[[int, Sequence[TokenBatch], torch.dtype], Underway]


class DeviceOwner:
    """Does chores and starts the engine's batches on its own thread; a second one waits for those batches, so that the
    next one can start meanwhile."""

    def __init__(self, backend: Backend, suffix: str = "") -> None:
        """`suffix`: of the threads' names, where there are several owners."""
        self.submit: Submit = backend.submit
        self.batches = CallbackExecutor(backend.depth)
        """Where the engine puts what the backend is to compute."""
        self._chores: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._waits: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stopping = False
        self._threads = [
            threading.Thread(target=run, name=name + suffix, daemon=True)
            for run, name in ((self._own, "device-owner"), (self._wait, "device-waiter"))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Have the threads end after the work that they already have, and wait for them a little.

        One that comes back from native code while the interpreter ends is torn out of it, which not every C++ library
        survives.
        """
        self._do(self._end)
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))

    def call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run `function` on the device thread; its result or exception arrives in the future."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._do(lambda: None if future.cancelled() else _settle(future, function))
        return future

    def pass_through(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run `function` behind the batches that both threads have by now."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._do(lambda: self._waits.put(lambda: _settle(future, function)))
        return future

    def _do(self, chore: Callable[[], None]) -> None:
        self._chores.put(chore)
        self.batches.interrupt()

    def _end(self) -> None:
        self._stopping = True
        self._waits.put(lambda: None)

    def _own(self) -> None:
        while not self._stopping:
            batch = self.batches.fetch()
            if batch is None:
                self._chores.get()()
            else:
                self._start(batch)
            # What a batch holds, callers' memory among it, is not to wait for the next one.
            del batch

    def _start(self, batch: Batch) -> None:
        try:
            underway = self.submit(batch.weights_key, token_batches(batch), DTYPES[batch.sums_dtype])
        except Exception as error:
            _fail(batch, error)
            return
        if batch.alone:
            # Nothing else waits for this thread: not worth the waking of the other one.
            _finish(batch, underway)
        else:
            self._waits.put(lambda: _finish(batch, underway))

    def _wait(self) -> None:
        while not self._stopping or not self._waits.empty():
            work = self._waits.get()
            work()
            del work


def token_batches(batch: Batch) -> Sequence[TokenBatch]:
    """The requests of a batch, as tensors of the memory that is lent with it."""
    hidden_dtype, sums_dtype = DTYPES[batch.hidden_dtype], DTYPES[batch.sums_dtype]

    def tensor(data: memoryview, dtype: torch.dtype, tokens: int) -> Tensor:
        return torch.frombuffer(data, dtype=dtype).view(tokens, -1)

    return [
        TokenBatch(
            tensor(hidden, hidden_dtype, tokens),
            None if scales is None else tensor(scales, torch.float32, tokens),
            tensor(ids, torch.int32, tokens),
            tensor(weights, torch.float32, tokens),
            tensor(sums, sums_dtype, tokens),
        )
        for hidden, scales, ids, weights, sums, tokens in batch.requests()
    ]


def _finish(batch: Batch, underway: Underway) -> None:
    try:
        computed = underway.result()
    except Exception as error:
        _fail(batch, error)
    else:
        batch.finish(computed.pairs.tolist(), *computed.seconds)


def _fail(batch: Batch, error: Exception) -> None:
    batch.fail(f"the device failed: {type(error).__name__}: {error}", device_failed=True)


def _settle(future: asyncio.Future[T], function: Callable[[], T]) -> None:
    """Run `function` and hand its outcome to the event loop of `future`."""
    try:
        result = function()
    except Exception as error:
        future.get_loop().call_soon_threadsafe(_reject, future, error)
    else:
        future.get_loop().call_soon_threadsafe(_resolve, future, result)


def _resolve(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _reject(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
