"""One stream or connection: who calls, and which of their requests are being answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any, cast

from expertd.proto import codec
from expertd.proto.base.errors import Cancelled, ExpertdError
from expertd.proto.lane.layout import SharedSegment
from expertd.server.rpc.incoming import Executor, Incoming


class Conversation:
    """What the requests of one caller's stream or connection have in common. Lives on the event loop."""

    def __init__(self, caller: str, executor: Executor, segment: SharedSegment | None = None) -> None:
        """`segment` is where the tensors lie that the caller's messages do not carry."""
        self._caller = caller
        self._executor = executor
        self._segment = segment
        self._in_flight: dict[int, asyncio.Task[Any]] = {}
        self._cancelled: set[asyncio.Task[Any]] = set()

    async def respond(self, message: bytes) -> bytes | None:
        """The response to one message; what is wrong with a request is in it. None: there is to be none."""
        request_id = 0
        try:
            request = codec.parse_request(message)
            if request.cancels is not None:
                self.cancel(request.cancels)
                return None
            request_id = request.request_id
            with self.request(request_id):
                return await self._executor.answer(Incoming(request, self._caller, segment=self._segment))
        except ExpertdError as error:
            return codec.encode_error(request_id, error)

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
