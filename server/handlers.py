"""The RPCs of `expertd.v1.ExpertShard`: decode, await, encode."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import torch

from expertd.proto import codec
from expertd.proto.codec import ExecuteResult, RawRequest, ShardInfo, StageTimings
from expertd.proto.errors import ExpertdError, ServerFault
from expertd.proto.loopback import UNIX
from expertd.proto.segment import SharedSegment
from expertd.server.backlog import Backlog
from expertd.server.conversation import Conversation
from expertd.server.journal import Journal
from expertd.server.scheduler import Scheduler
from expertd.server.shadow import ShadowCheck
from expertd.server.shard import Shard
from expertd.server.tickets import Tickets
from expertd.server.verifier import Verifier

log = logging.getLogger(__name__)
BACKLOG_FACTOR = 2
"""Times --max-queued-bytes: a single stream, which gets half of the backlog, is refused before it is not read from."""


class ExpertShardHandlers:
    """One server's RPCs. They hold no state of their own but the calls and streams that are open."""

    def __init__(
        self,
        shard: Shard,
        info: ShardInfo,
        scheduler: Scheduler,
        verifier: Verifier,
        shadow: ShadowCheck | None,
        journal: Journal,
        tickets: Tickets,
    ) -> None:
        self._shard = shard
        self._info = info
        self._scheduler = scheduler
        self._verifier = verifier
        self._shadow = shadow
        self._journal = journal
        self._tickets = tickets
        self._readers: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[Any]] = set()
        self._streams = itertools.count(1)
        self._backlog = Backlog(BACKLOG_FACTOR * info.max_queued_bytes)

    def register(self, server: grpc.aio.Server) -> None:
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "GetShard": grpc.unary_unary_rpc_method_handler(self.get_shard),
            "Execute": grpc.unary_unary_rpc_method_handler(self.execute),
            "ExecuteStream": grpc.stream_stream_rpc_method_handler(self.execute_stream),
            "VerifyShard": grpc.unary_stream_rpc_method_handler(
                self.verify_shard, codec.VerifyRequest.FromString, codec.VerifyResponse.SerializeToString
            ),
            "RegisterSharedMemory": grpc.unary_unary_rpc_method_handler(
                self.register_shared_memory,
                codec.RegistrationRequest.FromString,
                codec.Registration.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(codec.SERVICE, methods),))

    def stop_reading(self) -> None:
        """End every stream once the requests already read from it are answered."""
        for reader in self._readers:
            reader.cancel()

    async def answered(self, timeout: float) -> None:
        """Wait until all calls and streams have ended and their answers are sent, for at most `timeout` seconds."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=timeout)

    def _track(self) -> None:
        call = asyncio.current_task()
        if call is not None:
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def get_shard(self, data: bytes, context: Context) -> bytes:
        try:
            codec.check_shard_request(data)
            self._scheduler.check_open()
        except ExpertdError as error:
            await context.abort(error.code, str(error))
        return codec.encode_shard(self._info).SerializeToString()

    async def execute(self, data: bytes, context: Context) -> bytes:
        self._track()
        try:
            request = self._journal.adopt(codec.parse_request(data), context.invocation_metadata() or ())
            return await self._answer(request, context.peer(), context.time_remaining())
        except ExpertdError as error:
            await context.abort(error.code, str(error), _pushback(error))

    async def execute_stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        self._track()
        share, writing = self._backlog.open(), asyncio.Lock()
        # Connections over a unix socket have no names to tell callers apart by.
        peer = context.peer()
        conversation = Conversation(f"{peer} stream {next(self._streams)}" if peer.startswith(UNIX) else peer)

        async def respond(data: bytes) -> None:
            num_bytes = len(data)
            try:
                response = await self.respond(data, conversation)
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

    async def verify_shard(self, request: codec.VerifyRequest, context: Context) -> None:
        self._track()
        try:
            async with contextlib.aclosing(
                self._verifier.run(request.layers, request.experts, request.seed)
            ) as reports:
                async for agreement in reports:
                    await context.write(codec.VerifyResponse(**dataclasses.asdict(agreement)))
        except ExpertdError as error:
            await context.abort(error.code, str(error))

    async def register_shared_memory(self, request: codec.RegistrationRequest, context: Context) -> codec.Registration:
        try:
            self._scheduler.check_open()
            return self._tickets.issue(context.peer())
        except ExpertdError as error:
            await context.abort(error.code, str(error))

    async def respond(self, data: bytes, conversation: Conversation) -> bytes | None:
        """The response to one message of a stream; what is wrong with a request is in it. None: there is to be none."""
        request_id = 0
        try:
            request = codec.parse_request(data)
            if request.cancels is not None:
                conversation.cancel(request.cancels)
                return None
            request_id = request.request_id
            with conversation.request(request_id):
                return await self._answer(request, conversation.caller, None, conversation.segment)
        except ExpertdError as error:
            return codec.encode_error(request_id, error)

    async def _answer(
        self, request: RawRequest, caller: str, time_remaining: float | None, segment: SharedSegment | None = None
    ) -> bytes:
        """Compute one request; every outcome is recorded."""
        with self._journal.request(request, caller):
            try:
                return await self._compute(request, caller, time_remaining, segment)
            except ExpertdError:
                raise
            except Exception as error:
                log.exception("request %d failed", request.request_id)
                raise ServerFault(f"{type(error).__name__}: {error}") from error

    async def _compute(
        self, request: RawRequest, caller: str, time_remaining: float | None, segment: SharedSegment | None
    ) -> bytes:
        arrived = time.perf_counter()
        # Before anything is read of the tensors: a server with too much to do has no time for what it will refuse.
        self._scheduler.check_room(min(request.num_tokens, self._info.max_tokens_per_request), request.num_tensor_bytes)
        config = self._shard.config
        call = codec.decode_call(
            request, config.hidden_size, config.num_experts_per_tok, self._info.max_tokens_per_request, segment
        )
        batch = self._shard.admit(call)
        decoded = time.perf_counter()
        timeout = min((limit for limit in (call.timeout, time_remaining) if limit is not None), default=None)
        done = await self._scheduler.execute(caller, call.layer, batch, call.reply_dtype, timeout)
        computed = time.perf_counter()
        timings = StageTimings(decoded - arrived, done.queue, done.copy_in, done.compute, done.copy_out)
        pairs = done.partials.pairs.numpy()
        receipt = {expert: count for expert, count in zip(self._shard.experts, pairs.tolist(), strict=True) if count}
        sums = done.partials.sums if call.reply_into is None else torch.empty(0, dtype=call.reply_dtype)
        response = codec.encode_result(ExecuteResult(call.request_id, sums, receipt, timings))
        if self._shadow is not None:
            self._shadow.offer(call.layer, batch, done.partials.sums)
        encoded = time.perf_counter()
        self._journal.answered(call, caller, pairs, timings, encoded - computed, encoded - arrived)
        return response


def _pushback(error: ExpertdError) -> tuple[tuple[str, str], ...]:
    """gRPC's own way to say when to come back."""
    if error.retry_after is None:
        return ()
    return ((codec.PUSHBACK, str(codec.whole_milliseconds(error.retry_after))),)


Context = grpc.aio.ServicerContext[object, object]
