"""Whether something that may hang still gives signs of life."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future


class Pulse:
    """Asks on a thread, one at a time, that may hang with what it asks. Lives on one event loop."""

    def __init__(self, what: str, sign: Callable[[], object]) -> None:
        """`sign` returns when `what` gave a sign of life."""
        self.what = what
        self._sign = sign
        self._asked: Future[None] | None = None

    async def beats(self, seconds: float) -> bool:
        """Whether a sign comes within so many seconds."""
        asked = self._asked
        if asked is None:
            asked = self._asked = Future()
            threading.Thread(target=self._ask, args=(asked,), name="pulse", daemon=True).start()
        done, _ = await asyncio.wait((asyncio.wrap_future(asked),), timeout=seconds)
        return bool(done)

    def _ask(self, asked: Future[None]) -> None:
        try:
            self._sign()
        finally:
            self._asked = None
            asked.set_result(None)
