"""The RPCs of `expertd.v1.ExpertAdmin`, and the door that they come in through."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, TypeAlias

import grpc
import grpc.aio

from expertd.proto.base.errors import ExpertdError, InvalidBatch
from expertd.proto.codec.admin import (
    ADMIN,
    ReleaseRequest,
    ShareRequest,
    UpdateDone,
    UpdateRequest,
    UpdateResponse,
    WeightsRequest,
)
from expertd.server.admin.holdings import Holdings
from expertd.server.admin.rollout import Rollout
from expertd.server.admin.update import Progress, Updater, words
from expertd.server.options.config import Address, InvalidOption
from expertd.server.options.ports import obstacle_to_bind
from expertd.server.rpc.execution import Context
from expertd.server.rpc.limits import SmallMessages
from expertd.server.rpc.security import ServerSecurity

log = logging.getLogger(__name__)
Methods: TypeAlias = dict[str, "grpc.RpcMethodHandler[Any, Any]"]


class AdminDoor:
    """A gRPC server of its own, for who runs the server."""

    def __init__(self, address: Address, holdings: Holdings, security: ServerSecurity) -> None:
        self.address = address
        self._held = holdings
        self._updater = Updater(holdings)
        self._rollout = Rollout(holdings)
        self._security = security

    async def listen(self) -> None:
        obstacle = obstacle_to_bind(self.address)
        if obstacle is not None:
            raise InvalidOption(f"--admin-listen {self.address} cannot be bound: {obstacle}")
        self._server = grpc.aio.server(
            interceptors=[*self._security.interceptors, SmallMessages()], options=[("grpc.so_reuseport", 0)]
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(ADMIN, self._methods()),))
        self.address = dataclasses.replace(self.address, port=self._security.add_port(self._server, self.address))
        await self._server.start()
        log.info("administration on %s (%s)", self.address, self._security)

    def disconnect(self) -> None:
        """No memory is shared here."""

    async def drain(self, seconds: float) -> None:
        """Give up an update that is running: the experts that it would bring are not wanted any more."""
        await self._server.stop(None)

    async def close(self) -> None: ...

    def _methods(self) -> Methods:
        stream, unary = grpc.unary_stream_rpc_method_handler, grpc.unary_unary_rpc_method_handler
        told, done = UpdateResponse.SerializeToString, UpdateDone.SerializeToString
        return {
            "UpdateShard": stream(self._update_shard, UpdateRequest.FromString, told),
            "UpdateWeights": stream(self._update_weights, WeightsRequest.FromString, told),
            "ShareCalls": unary(self._share_calls, ShareRequest.FromString, done),
            "ReleaseWeights": unary(self._release_weights, ReleaseRequest.FromString, done),
        }

    async def _update_shard(self, request: UpdateRequest, context: Context) -> None:
        epoch = request.placement_epoch
        wanted = {one.layer: tuple(one.experts) for one in request.layers}
        chosen = {
            one.layer: {its.number: tuple(its.experts) for its in one.devices} for one in request.layers if one.devices
        }
        async with self._audited("UpdateShard", f"epoch {epoch}: {words(wanted)}", context):
            _check_names(request)
            await self._tell(self._updater.run(epoch, wanted, chosen), context)

    async def _update_weights(self, request: WeightsRequest, context: Context) -> None:
        epoch, folder, fingerprint = request.placement_epoch, request.folder, request.model_fingerprint
        async with self._audited("UpdateWeights", f"epoch {epoch}: {folder!r} {fingerprint!r}", context):
            await self._tell(self._rollout.stage(epoch, folder, fingerprint), context)

    async def _share_calls(self, request: ShareRequest, context: Context) -> UpdateDone:
        epoch, fingerprint, share = request.placement_epoch, request.model_fingerprint, request.share
        sharing = self._rollout.share(epoch, fingerprint, share)
        return await self._do("ShareCalls", f"epoch {epoch}: {share:g} for {fingerprint!r}", sharing, context)

    async def _release_weights(self, request: ReleaseRequest, context: Context) -> UpdateDone:
        epoch, fingerprint = request.placement_epoch, request.model_fingerprint
        releasing = self._rollout.release(epoch, fingerprint)
        return await self._do("ReleaseWeights", f"epoch {epoch}: {fingerprint!r}", releasing, context)

    async def _tell(self, updating: AsyncGenerator[Progress, None], context: Context) -> None:
        async with contextlib.aclosing(updating):
            async for progress in updating:
                await context.write(self._told(progress))

    async def _do(self, method: str, what: str, doing: Awaitable[None], context: Context) -> UpdateDone:
        async with self._audited(method, what, context):
            await doing
        return self._done(0.0)

    @contextlib.asynccontextmanager
    async def _audited(self, method: str, what: str, context: Context) -> AsyncIterator[None]:
        """Tell the log who asks for `what`, and the log and the caller what it fails with."""
        who = f"by {self._security.identities.proven(context) or 'unproven'} from {context.peer()}"
        log.info("audit: %s %s, %s", method, who, what)
        try:
            yield
        except ExpertdError as error:
            log.warning("audit: %s %s failed: %s", method, who, error)
            await context.abort(error.code, str(error))

    def _told(self, progress: Progress) -> UpdateResponse:
        response = UpdateResponse(**dataclasses.asdict(progress.made))
        if progress.overlap is not None:
            response.done.CopyFrom(self._done(progress.overlap))
        return response

    def _done(self, overlap: float) -> UpdateDone:
        held = self._held.generations
        return UpdateDone(
            placement_epoch=held.serving.shard.placement_epoch,
            overlap_ns=round(overlap * 1e9),
            next_model_fingerprint="" if held.next is None else held.next.fingerprint,
        )


def _check_names(request: UpdateRequest) -> None:
    """Raise `InvalidBatch` where something is named twice, of which only one would count."""
    layers = [one.layer for one in request.layers]
    if layers != sorted(set(layers)):
        raise InvalidBatch(f"layers are {layers}; they must ascend")
    for one in request.layers:
        devices = [its.number for its in one.devices]
        if len(devices) != len(set(devices)):
            raise InvalidBatch(f"devices of layer {one.layer} are {devices}; each may be named once")
