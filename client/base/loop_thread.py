"""An event loop on a thread of its own, for callers without one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
END_SECONDS = 1.0
"""For what other threads wait for when it is closed."""


class LoopThread:
    """Runs from the beginning until `close`, after which methods raise `RuntimeError`, as they do in a forked
    process, where the loop does not run. They are for other threads."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        # A garbage collector's run, which may be at any point of a thread that holds it, gives the loop work, too.
        self._ending = threading.RLock()
        self._ended = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        self._thread.start()

    def soon(self, function: Callable[[], object]) -> None:
        """Have the loop call `function`."""
        with self._open():
            self._loop.call_soon_threadsafe(function)

    def start(self, call: Coroutine[None, None, T]) -> Future[T]:
        """Have the loop run `call`."""
        try:
            with self._open():
                return asyncio.run_coroutine_threadsafe(call, self._loop)
        except RuntimeError:
            # Closed meanwhile, by another thread.
            call.close()
            raise

    def wait(self, call: Coroutine[None, None, T]) -> T:
        """What `call` returns."""
        future = self.start(call)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C while waiting: the call must not go on without anybody who wants it.
            future.cancel()
            raise

    def check_process(self) -> None:
        """Raise `RuntimeError` in a process that was forked from the one it runs in."""
        if os.getpid() != self._process:
            raise RuntimeError("the coordinator was connected before this process was forked; connect after the fork")

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """While the loop takes anything: what came after it has looked at its last tasks would never be run."""
        # First: in a forked process the lock may be one that nobody ever lets go of.
        self.check_process()
        with self._ending:
            if self._ended:
                raise RuntimeError("the event loop was closed by another thread")
            yield

    def _live(self) -> None:
        """When it is to stop, other threads may still wait for what runs on it."""
        self._loop.run_forever()
        with self._ending:
            self._ended = True
        self._loop.run_until_complete(_end_others())
        self._loop.close()


async def _end_others() -> None:
    """Let calls fail by themselves, now that no server is left to them; cancel what goes on nevertheless."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, lasting = await asyncio.wait(others, timeout=END_SECONDS)
        for task in lasting:
            task.cancel()
        await asyncio.gather(*lasting, return_exceptions=True)
