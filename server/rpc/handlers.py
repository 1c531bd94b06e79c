"""The RPCs of `expertd.v1.ExpertShard`: decode, await, encode."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from typing import Any

import grpc
import grpc.aio
import torch

from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, ServerFault
from expertd.proto.codec import ExecuteResult, RawRequest, ShardInfo, StageTimings
from expertd.proto.lane.layout import SharedSegment
from expertd.server.rpc.execution import Context, ExecuteHandlers
from expertd.server.rpc.tickets import Tickets
from expertd.server.scheduling.batching import Scheduler
from expertd.server.scheduling.shadow import ShadowCheck
from expertd.server.scheduling.shard import Shard
from expertd.server.scheduling.verifier import Verifier
from expertd.server.telemetry.journal import Journal

log = logging.getLogger(__name__)


class ExpertShardHandlers(ExecuteHandlers):
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
        super().__init__(info.max_queued_bytes)
        self._shard = shard
        self.info = info
        """The answer to `GetShard`; complete once the weights are loaded."""
        self._scheduler = scheduler
        self._verifier = verifier
        self._shadow = shadow
        self._journal = journal
        self._tickets = tickets

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

    async def get_shard(self, data: bytes, context: Context) -> bytes:
        try:
            codec.check_shard_request(data)
            self._scheduler.check_open()
        except ExpertdError as error:
            await context.abort(error.code, str(error))
        return codec.encode_shard(self.info).SerializeToString()

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
        self._scheduler.check_room(min(request.num_tokens, self.info.max_tokens_per_request), request.num_tensor_bytes)
        config = self._shard.config
        call = codec.decode_call(
            request, config.hidden_size, config.num_experts_per_tok, self.info.max_tokens_per_request, segment
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
