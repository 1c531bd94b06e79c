"""gRPC's health service: whether callers are to come here."""

from __future__ import annotations

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio

from expertd.proto import codec

NAMES = ("", codec.SERVICE)


class Health(aio.HealthServicer):
    """One state for the server and for its one service."""

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in NAMES:
            await self.set(name, status.SERVING if serving else status.NOT_SERVING)
