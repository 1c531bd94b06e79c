"""One connection of shared memory: its frames, and the calls that they begin."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from expertd.proto import codec
from expertd.proto.base.errors import InvalidBatch
from expertd.proto.base.tasks import Tasks
from expertd.proto.lane.frames import MAX_FRAME_BYTES, Frames


class Connection:
    """The calls in flight of one connection."""

    def __init__(
        self, respond: Callable[[bytes], Awaitable[bytes | None]], tasks: Tasks, max_frame_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        """`tasks` are its alone."""
        self._respond = respond
        self._responding = tasks
        self.frames = Frames(self._start, self._end, max_frame_bytes)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def idle(self, timeout: float | None = None) -> None:
        """Wait until every request that was read has its response, or is dropped and the device done with it."""
        await self._responding.settle(timeout)

    def _start(self, request: bytes) -> None:
        self._responding.start(self._reply(request), "answering a request over shared memory")

    async def _reply(self, request: bytes) -> None:
        response = await self._respond(request)
        if response is not None:
            self.frames.send(response)

    def _end(self, error: Exception | None) -> None:
        if isinstance(error, InvalidBatch):
            self.frames.send(codec.encode_error(0, error))
        self._responding.cancel()
        self.ended.set_result(None)
