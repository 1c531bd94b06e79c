"""The RPCs of `expertd.v1.ExpertShard`."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import grpc
import grpc.aio

from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError
from expertd.server.rpc.execution import Context, ExecuteHandlers
from expertd.server.rpc.executor import EngineExecutor
from expertd.server.rpc.tickets import Tickets
from expertd.server.rpc.verifier import Verifier


class ExpertShardHandlers:
    """One server's RPCs. They hold no state of their own but the calls and streams that are open."""

    def __init__(
        self, execution: ExecuteHandlers, executor: EngineExecutor, verifier: Verifier, tickets: Tickets
    ) -> None:
        self.execution = execution
        self._executor = executor
        self._verifier = verifier
        self.tickets = tickets

    def register(self, server: grpc.aio.Server) -> None:
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "GetShard": grpc.unary_unary_rpc_method_handler(self.get_shard, codec.ShardRequest.FromString),
            "Execute": grpc.unary_unary_rpc_method_handler(self.execution.execute),
            "ExecuteStream": grpc.stream_stream_rpc_method_handler(self.execution.execute_stream),
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

    async def get_shard(self, request: codec.ShardRequest, context: Context) -> bytes:
        try:
            self._executor.check_open()
        except ExpertdError as error:
            await context.abort(error.code, str(error))
        return codec.encode_shard(self._executor.info).SerializeToString()

    async def verify_shard(self, request: codec.VerifyRequest, context: Context) -> None:
        self.execution.track()
        try:
            async with contextlib.aclosing(
                self._verifier.run(request.layers, request.experts, request.seed, request.model_fingerprint)
            ) as reports:
                async for agreement in reports:
                    await context.write(codec.VerifyResponse(**dataclasses.asdict(agreement)))
        except ExpertdError as error:
            await context.abort(error.code, str(error))

    async def register_shared_memory(self, request: codec.RegistrationRequest, context: Context) -> codec.Registration:
        try:
            self._executor.check_open()
            return self.tickets.issue(context.peer(), self.execution.identities.proven(context), request.gpu)
        except ExpertdError as error:
            await context.abort(error.code, str(error))
