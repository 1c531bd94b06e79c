"""`expertd health`: ask a server whether it serves; for container health checks and probes, so it starts quickly."""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import replace
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd.client.transport.security import ClientSecurity, add_tls_arguments, security_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", help="host:port of the server")
    parser.add_argument("--timeout", type=float, default=4.0, help="seconds to wait for the answer (default: 4)")
    add_tls_arguments(parser)
    parser.add_argument(
        "--server-name", help="name in the server's certificate, where it is not the host that is asked"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when the server is SERVING, 1 when it is not or cannot be reached, 2 for unusable options."""
    try:
        security = replace(security_from(arguments), server_name=arguments.server_name)
        status = asyncio.run(_ask(arguments.address, security, arguments.timeout))
    except ValueError as error:
        print(f"expertd health: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.address}: {status}")
    return 0 if status == "SERVING" else 1


async def _ask(address: str, security: ClientSecurity, timeout: float) -> str:
    """The status by its name in the health protocol, or why there is none."""
    async with security.open_channel(address, ()) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
