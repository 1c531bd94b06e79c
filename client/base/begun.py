"""Coroutines that begin where they are made, without a turn of the event loop before."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from functools import partial


class Begun:
    """A coroutine whose first step is done at once, and the others by the task that awaits it, once."""

    def __init__(self, coroutine: Coroutine[object, None, None]) -> None:
        self._coroutine = coroutine
        self._step(partial(coroutine.send, None))

    def _step(self, step: Callable[[], object]) -> None:
        """What it waits for then, or how it ended."""
        self._error: BaseException | None = None
        try:
            self._waits_for = step()
            self._ended = False
        except StopIteration:
            self._ended = True
        except Exception as error:
            self._ended, self._error = True, error

    def __await__(self) -> Generator[object, None, None]:
        while not self._ended:
            try:
                yield self._waits_for
            except BaseException as error:
                self._step(partial(self._coroutine.throw, error))
            else:
                self._step(partial(self._coroutine.send, None))
        if self._error is not None:
            raise self._error
