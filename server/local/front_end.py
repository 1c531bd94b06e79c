"""A front end: a process that speaks gRPC with callers, for the process that owns the device.

Started by `server/local/front_ends.py`. It ends when the server says so, or is gone; signals are the server's matter.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import grpc.aio
import uvloop
from grpc_reflection.v1alpha import reflection

from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, NotPermitted
from expertd.proto.base.garbage import spared_imports
from expertd.proto.base.loopback import UNIX, check_here
from expertd.proto.base.malloc import keep_freed_memory
from expertd.server.local.link import ServerLink, Settings
from expertd.server.rpc.door import GrpcDoor
from expertd.server.rpc.execution import Context, ExecuteHandlers
from expertd.server.rpc.incoming import Call, Incoming
from expertd.server.rpc.limits import UNLIMITED, server_options
from expertd.server.rpc.security import ServerSecurity
from expertd.server.telemetry.logs import configure_logging

SETTINGS_BYTES = 1 << 16
OURS = f"/{codec.SERVICE}/"
REFLECTION = f"/{reflection.SERVICE_NAME}/"
REGISTER = f"{OURS}RegisterSharedMemory"


class LinkExecutor:
    """Answers with what the server says."""

    def __init__(self, link: ServerLink) -> None:
        self._link = link

    def submit(self, incoming: Incoming) -> Call:
        try:
            request = codec.parse_request(incoming.message)
        except ExpertdError as error:
            return _refused(0, error)
        message, cancels = incoming.message, request.cancels
        if cancels is not None:
            refusal = _refused(request.request_id, codec.not_a_request(cancels))
            return replace(refusal, cancels=cancels)
        if incoming.time_remaining is not None:
            left = max(1, int(incoming.time_remaining * 1e6))
            timeout = min(request.timeout_us or left, left)
            message = codec.encode_request(replace(request, timeout_us=timeout))
        number, answer = self._link.call(message, incoming.caller, incoming.identity)
        return Call(request.request_id, None, answer, partial(self._link.cancel, number))


def _refused(request_id: int, error: ExpertdError) -> Call:
    answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    answer.set_exception(error)
    return Call(request_id, None, answer, lambda: None)


class FrontEndHandlers(grpc.GenericRpcHandler):
    """All RPCs of a front end: the two with tensors go over the link, the others as they are over gRPC."""

    def __init__(self, execution: ExecuteHandlers, server: grpc.aio.Channel) -> None:
        self._execution = execution
        self._server = server
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            f"{OURS}Execute": grpc.unary_unary_rpc_method_handler(execution.execute),
            f"{OURS}ExecuteStream": grpc.stream_stream_rpc_method_handler(execution.execute_stream),
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        """How a method is answered; of what passes by, one request or response is a stream of one message."""
        found = self._methods.get(details.method)
        return found or grpc.stream_stream_rpc_method_handler(partial(self._pass_on, details.method))

    async def _pass_on(self, method: str, requests: AsyncIterator[bytes], context: Context) -> None:
        if method.startswith(OURS):
            self._execution.track()
        if method == REGISTER:
            try:
                # The server itself sees none but callers on its machine: its front ends.
                check_here(context.peer())
            except NotPermitted as error:
                await context.abort(error.code, str(error))
        metadata = [(key, value) for key, value in context.invocation_metadata() or () if key != "user-agent"]
        timeout = context.time_remaining()
        channel: Any = self._server
        if method.startswith(REFLECTION):
            call = channel.stream_stream(method)(requests, timeout=timeout, metadata=metadata)
        else:
            # Not as a stream: gRPC loses the status of one that the server ends while it is being written.
            request = await anext(requests, b"")
            call = channel.unary_stream(method)(request, timeout=timeout, metadata=metadata)
            # gRPC keeps the frames of what aborts a call until garbage is collected.
            del request
        try:
            async for response in call:
                await context.write(response)
            context.set_trailing_metadata(tuple(await call.trailing_metadata() or ()))
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
        finally:
            call.cancel()


async def serve(connection: socket.socket, settings: Settings) -> bool:
    """Answer callers until the server says that it drains or is gone; whether it said so."""
    config = settings.config
    link = ServerLink(settings)
    await link.open(connection)
    security = ServerSecurity(config)
    execution = ExecuteHandlers(LinkExecutor(link), config.max_queued_bytes, security.identities)
    async with grpc.aio.insecure_channel(f"{UNIX}{settings.server}", UNLIMITED) as channel:

        def make() -> grpc.aio.Server:
            options = server_options(config, settings.max_message_bytes, front_end=True)
            server = grpc.aio.server(interceptors=security.interceptors, options=options)
            server.add_generic_rpc_handlers((FrontEndHandlers(execution, channel),))
            return server

        door = GrpcDoor(settings.listen, execution, make, security.add_port)
        door.bind()
        await door.listen()
        link.say_listening()
        await door.drain(await link.draining)
        await door.close()
    return not link.lost


def main() -> int:
    """Exit code 0 after a drain, 1 when the server is gone."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    told = connection.recv(SETTINGS_BYTES)
    if not told:
        return 1
    # From the process that started this one, over a socket that nobody else has.
    settings: Settings = pickle.loads(told)
    configure_logging(settings.config.log_level, settings.config.log_format)
    keep_freed_memory()
    with spared_imports():
        return 0 if uvloop.run(serve(connection, settings)) else 1


if __name__ == "__main__":
    sys.exit(main())
