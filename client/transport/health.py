"""Servers asked whether they serve; without torch, which takes seconds to import."""

from __future__ import annotations

from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd.client.transport.security import ClientSecurity


async def ask_health(address: str, security: ClientSecurity, timeout: float) -> str:
    """The status by its name in the health protocol, or why there is none."""
    async with security.open_channel(address, ()) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
