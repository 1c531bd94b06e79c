"""Background tasks that somebody looks after: what fails is logged, counted and, if it is to go on, begun again."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

log = logging.getLogger(__name__)
FIRST_PAUSE = 0.25
"""Seconds before kept work is begun again; doubled each time, with up to half of it taken off or added."""
LONGEST_PAUSE = 8.0
"""Work that went on for longer before it failed is begun again after the first pause."""
Work: TypeAlias = Coroutine[Any, Any, None]


class Tasks:
    """The background tasks of one owner, who closes or settles them before it ends."""

    def __init__(
        self,
        on_error: Callable[[], object] = lambda: None,
        on_restart: Callable[[], object] = lambda: None,
        pauses: tuple[float, float] = (FIRST_PAUSE, LONGEST_PAUSE),
    ) -> None:
        """Called whenever one of them fails, and whenever one begins again, such as the `inc` of a counter."""
        self._on_error = on_error
        self._on_restart = on_restart
        self._pauses = pauses
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Work, what: str) -> asyncio.Task[None]:
        """Run `work` beside its caller; `what` it is doing names it in the log."""
        task = asyncio.create_task(work, name=what)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def keep(self, work: Callable[[], Work], what: str) -> asyncio.Task[None]:
        """Like `start`; when it fails, `work` is called again after a pause, until it returns or is cancelled."""
        return self.start(self._again(work, what), what)

    def cancel(self) -> None:
        for task in self._running:
            task.cancel()

    async def settle(self, timeout: float | None = None) -> None:
        """Wait until all have ended, for at most `timeout` seconds."""
        if self._running:
            await asyncio.wait(self._running, timeout=timeout)

    async def close(self) -> None:
        """Cancel all, and wait until they have ended."""
        self.cancel()
        await self.settle()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._tell(f"{task.get_name()} failed", error)

    async def _again(self, work: Callable[[], Work], what: str) -> None:
        first, longest = self._pauses
        pause = first
        while True:
            begun = time.monotonic()
            try:
                return await work()
            except (Exception, asyncio.CancelledError) as error:
                if _is_cancelled():
                    raise
                if time.monotonic() - begun > longest:
                    pause = first
                self._tell(f"{what} failed and begins again in about {pause:g} s", error)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, longest)
            self._on_restart()

    def _tell(self, message: str, error: BaseException) -> None:
        log.error(message, exc_info=error)
        self._on_error()


def _is_cancelled() -> bool:
    """Whether somebody cancelled the running task. What a task waits for may be cancelled without it, as gRPC's calls
    are when their channel is closed: work that is to go on must not end of that, and without a word."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
