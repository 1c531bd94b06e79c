"""`Execute` and `ExecuteStream`: hand in, await, send."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio

from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError
from expertd.proto.base.loopback import UNIX
from expertd.server.rpc.backlog import Backlog
from expertd.server.rpc.conversation import Conversation
from expertd.server.rpc.executor import EngineExecutor
from expertd.server.rpc.identity import Identities
from expertd.server.rpc.incoming import Incoming

Context: TypeAlias = grpc.aio.ServicerContext[object, object]
BACKLOG_FACTOR = 2
"""Times --max-queued-bytes: a single stream, which gets half of the backlog, is refused before it is not read from."""


class ExecuteHandlers:
    """The two RPCs with tensors, and the calls and streams that are open."""

    def __init__(self, executor: EngineExecutor, max_queued_bytes: int, identities: Identities) -> None:
        self._executor = executor
        self.identities = identities
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
        identity = self.identities.of(context)
        call = self._executor.submit(
            Incoming(data, context.peer(), context.time_remaining(), _span_of(context), identity)
        )
        # gRPC keeps the frames of what aborts a call until garbage is collected.
        del data
        try:
            return await asyncio.shield(call.answer)
        except ExpertdError as error:
            await context.abort(error.code, str(error), _pushback(error))
        except asyncio.CancelledError:
            call.cancel()
            raise

    async def execute_stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        self.track()
        share, responses = self._backlog.open(), asyncio.Queue[tuple[bytes | None, int] | None]()
        # Connections over a unix socket have no names to tell callers apart by.
        peer = context.peer()
        caller = f"{peer} stream {next(self._streams)}" if peer.startswith(UNIX) else peer
        identity = self.identities.of(context)
        conversation = Conversation(caller, identity, self._executor, lambda *response: responses.put_nowait(response))

        async def read() -> None:
            try:
                with contextlib.suppress(asyncio.CancelledError):
                    async for data in requests:
                        share.took(len(data))
                        conversation.take(data)
                        # The answer may wait for long; who answers keeps the request as long as it must.
                        del data
                        await share.room()
                # A drain ends no more than the reading.
                self._readers.discard(reader)
                await conversation.idle()
            finally:
                responses.put_nowait(None)

        reader = asyncio.create_task(read())
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        try:
            while (response := await responses.get()) is not None:
                data, num_bytes = response
                # A caller that is gone takes its stream with it: there is nobody to answer.
                with contextlib.suppress(grpc.aio.InternalError):
                    if data is not None:
                        await context.write(data)
                share.gave(num_bytes)
        finally:
            reader.cancel()
            conversation.leave()
            share.close()


def _span_of(context: Context) -> str:
    """The caller's span from the metadata of a call, if it is there."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent" and isinstance(value, str):
            return value
    return ""


def _pushback(error: ExpertdError) -> tuple[tuple[str, str], ...]:
    """gRPC's own way to say when to come back."""
    if error.retry_after is None:
        return ()
    return ((codec.PUSHBACK, str(codec.whole_milliseconds(error.retry_after))),)
