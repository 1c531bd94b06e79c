"""The RPCs of `expertd.v1.ExpertAdmin`, and the door that they come in through."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import Any

import grpc
import grpc.aio

from expertd.proto.base.errors import ExpertdError
from expertd.proto.codec.admin import ADMIN, UpdateDone, UpdateRequest, UpdateResponse
from expertd.server.admin.update import Progress, Updater, words
from expertd.server.options.config import Address, InvalidOption
from expertd.server.options.ports import obstacle_to_bind
from expertd.server.rpc.execution import Context
from expertd.server.rpc.limits import SmallMessages
from expertd.server.rpc.security import ServerSecurity

log = logging.getLogger(__name__)


class AdminDoor:
    """A gRPC server of its own, for who runs the server."""

    def __init__(self, address: Address, updater: Updater, security: ServerSecurity) -> None:
        self.address = address
        self._updater = updater
        self._security = security

    async def listen(self) -> None:
        obstacle = obstacle_to_bind(self.address)
        if obstacle is not None:
            raise InvalidOption(f"--admin-listen {self.address} cannot be bound: {obstacle}")
        self._server = grpc.aio.server(
            interceptors=[*self._security.interceptors, SmallMessages()], options=[("grpc.so_reuseport", 0)]
        )
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "UpdateShard": grpc.unary_stream_rpc_method_handler(
                self._update, UpdateRequest.FromString, UpdateResponse.SerializeToString
            )
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(ADMIN, methods),))
        self.address = dataclasses.replace(self.address, port=self._security.add_port(self._server, self.address))
        await self._server.start()
        log.info("administration on %s (%s)", self.address, self._security)

    async def until_listening(self) -> None: ...

    def disconnect(self) -> None:
        """No memory is shared here."""

    async def drain(self, seconds: float) -> None:
        """Give up an update that is running: the experts that it would bring are not wanted any more."""
        await self._server.stop(None)

    async def close(self) -> None: ...

    async def _update(self, request: UpdateRequest, context: Context) -> None:
        wanted = {one.layer: tuple(one.experts) for one in request.layers}
        who = f"{self._security.identities.proven(context) or 'unproven'} from {context.peer()}"
        log.info("audit: UpdateShard by %s, epoch %d: %s", who, request.placement_epoch, words(wanted))
        try:
            async with contextlib.aclosing(self._updater.run(request.placement_epoch, wanted)) as updating:
                async for progress in updating:
                    await context.write(_told(progress, self._updater.shard.placement_epoch))
        except ExpertdError as error:
            log.warning("audit: UpdateShard by %s failed: %s", who, error)
            await context.abort(error.code, str(error))


def _told(progress: Progress, epoch: int) -> UpdateResponse:
    response = UpdateResponse(
        read_bytes=progress.read_bytes,
        total_bytes=progress.total_bytes,
        ready_layers=progress.ready_layers,
        total_layers=progress.total_layers,
    )
    if progress.overlap is not None:
        response.done.CopyFrom(UpdateDone(placement_epoch=epoch, overlap_ns=round(progress.overlap * 1e9)))
    return response
