"""gRPC's health service: whether callers are to come here. Strangers may ask, so it keeps nothing of what they send."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from expertd.proto import codec
from expertd.server.rpc.execution import Context

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
NAMES = ("", codec.SERVICE)
"""One state for the server and for its one service."""
MOST_BYTES = 256
"""Of a request, which is as good as nothing but a name."""


class Health:
    """Lives on the event loop."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._answer = b""
        self.set_serving(False)

    def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        self._answer = health_pb2.HealthCheckResponse(status=status).SerializeToString()
        self._changed.set()
        self._changed = asyncio.Event()

    def register(self, server: grpc.aio.Server) -> None:
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Check": grpc.unary_unary_rpc_method_handler(self.check),
            "Watch": grpc.unary_stream_rpc_method_handler(self.watch),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    async def check(self, data: bytes, context: Context) -> bytes:
        await _refuse_strangers(data, context)
        return self._answer

    async def watch(self, data: bytes, context: Context) -> None:
        await _refuse_strangers(data, context)
        told = b""
        while True:
            changed, answer = self._changed, self._answer
            if answer == told:
                await changed.wait()
            else:
                # Whoever does not read keeps only himself waiting.
                await context.write(answer)
                told = answer


async def _refuse_strangers(data: bytes, context: Context) -> None:
    """Abort what does not ask for one of `NAMES`."""
    if _name_in(data) not in NAMES:
        await context.abort(grpc.StatusCode.NOT_FOUND, f"service is unknown; ask for '' or {codec.SERVICE!r}")


def _name_in(data: bytes) -> str | None:
    """What a HealthCheckRequest asks for."""
    if len(data) > MOST_BYTES:
        return None
    try:
        return health_pb2.HealthCheckRequest.FromString(data).service
    except DecodeError:
        return None
