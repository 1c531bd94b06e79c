"""One connection of shared memory: its frames, and the calls that they begin."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from expertd.proto import codec
from expertd.proto.base.errors import InvalidBatch
from expertd.proto.lane.frames import MAX_FRAME_BYTES, Frames


class Connection:
    """The calls in flight of one connection."""

    def __init__(
        self, respond: Callable[[bytes], Awaitable[bytes | None]], max_frame_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        self._respond = respond
        self._responding: set[asyncio.Task[None]] = set()
        self.frames = Frames(self._start, self._end, max_frame_bytes)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def idle(self, timeout: float | None = None) -> None:
        """Wait until every request that was read has its response, or is dropped and the device done with it."""
        if self._responding:
            await asyncio.wait(self._responding, timeout=timeout)

    def _start(self, request: bytes) -> None:
        task = asyncio.create_task(self._reply(request))
        self._responding.add(task)
        task.add_done_callback(self._responding.discard)

    async def _reply(self, request: bytes) -> None:
        response = await self._respond(request)
        if response is not None:
            self.frames.send(response)

    def _end(self, error: Exception | None) -> None:
        if isinstance(error, InvalidBatch):
            self.frames.send(codec.encode_error(0, error))
        for task in self._responding:
            task.cancel()
        self.ended.set_result(None)
