"""`Execute` and `ExecuteStream`: decode, await, encode, wherever the answers come from."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any, TypeAlias

import grpc
import grpc.aio

from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError
from expertd.proto.base.loopback import UNIX
from expertd.proto.codec import RawRequest
from expertd.server.rpc.backlog import Backlog
from expertd.server.rpc.conversation import Conversation
from expertd.server.rpc.incoming import Executor, Incoming

Context: TypeAlias = grpc.aio.ServicerContext[object, object]
BACKLOG_FACTOR = 2
"""Times --max-queued-bytes: a single stream, which gets half of the backlog, is refused before it is not read from."""


class ExecuteHandlers:
    """The two RPCs of one process, and the calls and streams that are open."""

    def __init__(self, executor: Executor, max_queued_bytes: int) -> None:
        self.executor = executor
        self._readers: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[Any]] = set()
        self._streams = itertools.count(1)
        self._backlog = Backlog(BACKLOG_FACTOR * max_queued_bytes)

    def stop_reading(self) -> None:
        """End every stream once the requests already read from it are answered."""
        for reader in self._readers:
            reader.cancel()

    async def idle(self, timeout: float) -> None:
        """Wait until all calls and streams have ended and their answers are sent, for at most `timeout` seconds."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=timeout)

    def track(self) -> None:
        """Have the drain wait for the RPC that is being answered, as for those of this class."""
        call = asyncio.current_task()
        if call is not None:
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def execute(self, data: bytes, context: Context) -> bytes:
        self.track()
        try:
            request = _adopt(codec.parse_request(data), context.invocation_metadata() or ())
            return await self.executor.answer(Incoming(request, context.peer(), context.time_remaining()))
        except ExpertdError as error:
            await context.abort(error.code, str(error), _pushback(error))

    async def execute_stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        self.track()
        share, writing = self._backlog.open(), asyncio.Lock()
        # Connections over a unix socket have no names to tell callers apart by.
        peer = context.peer()
        caller = f"{peer} stream {next(self._streams)}" if peer.startswith(UNIX) else peer
        conversation = Conversation(caller, self.executor)

        async def respond(data: bytes) -> None:
            num_bytes = len(data)
            try:
                response = await conversation.respond(data)
                # The answer may wait for long; the request need not.
                del data
                if response is not None:
                    # A caller that is gone takes its stream with it: there is nobody to answer.
                    with contextlib.suppress(grpc.aio.InternalError):
                        async with writing:
                            await context.write(response)
            finally:
                share.gave(num_bytes)

        async def read() -> None:
            async for data in requests:
                share.took(len(data))
                answers.create_task(respond(data))
                await share.room()

        async with asyncio.TaskGroup() as answers:
            reader = answers.create_task(read())
            self._readers.add(reader)
            reader.add_done_callback(self._readers.discard)


def _adopt(request: RawRequest, metadata: Iterable[tuple[str, str | bytes]]) -> RawRequest:
    """`request` with the caller's span from the metadata of a call, where it names none."""
    if request.traceparent:
        return request
    given = [value for key, value in metadata if key == "traceparent" and isinstance(value, str)]
    return replace(request, traceparent=memoryview(given[0].encode())) if given else request


def _pushback(error: ExpertdError) -> tuple[tuple[str, str], ...]:
    """gRPC's own way to say when to come back."""
    if error.retry_after is None:
        return ()
    return ((codec.PUSHBACK, str(codec.whole_milliseconds(error.retry_after))),)
