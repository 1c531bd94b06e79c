"""One stream or local connection: who calls, and which of their requests are being answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any, cast

from expertd.proto.base.errors import Cancelled
from expertd.proto.lane.layout import SharedSegment


class Conversation:
    """What the requests of one stream or local connection have in common. Lives on the event loop."""

    def __init__(self, caller: str, segment: SharedSegment | None = None) -> None:
        """`segment` is where the tensors lie that the caller's messages do not carry."""
        self.caller = caller
        self.segment = segment
        self._in_flight: dict[int, asyncio.Task[Any]] = {}
        self._cancelled: set[asyncio.Task[Any]] = set()

    @contextlib.contextmanager
    def request(self, request_id: int) -> Iterator[None]:
        """While the current task answers a request. Raises `Cancelled` in place of what `cancel` does to the task."""
        task = cast(asyncio.Task[Any], asyncio.current_task())
        self._in_flight[request_id] = task
        try:
            yield
        except asyncio.CancelledError:
            # The conversation may have ended as well: then there is nobody to tell.
            if task not in self._cancelled or task.uncancel() > 0:
                raise
            raise Cancelled(f"request {request_id} was cancelled by its caller") from None
        finally:
            self._cancelled.discard(task)
            if self._in_flight.get(request_id) is task:
                del self._in_flight[request_id]

    def cancel(self, request_id: int) -> None:
        """Stop answering a request; without effect when it is not in flight, or cancelled already."""
        task = self._in_flight.pop(request_id, None)
        if task is not None:
            self._cancelled.add(task)
            task.cancel()
