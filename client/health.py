"""`expertd health`: ask a server whether it serves; for container health checks and probes, so it starts quickly."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd.client.security import ClientSecurity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", help="host:port of the server")
    parser.add_argument("--timeout", type=float, default=4.0, help="seconds to wait for the answer (default: 4)")
    parser.add_argument("--tls-ca", type=Path, help="PEM file of the authorities that sign servers' certificates")
    parser.add_argument(
        "--tls-client-cert", type=Path, help="PEM file of a client's certificate chain, for --tls-client-ca"
    )
    parser.add_argument("--tls-client-key", type=Path, help="PEM file of its private key")
    parser.add_argument(
        "--server-name", help="name in the server's certificate, where it is not the host that is asked"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when the server is SERVING, 1 when it is not or cannot be reached, 2 for unusable options."""
    try:
        security = ClientSecurity(
            root_ca=arguments.tls_ca,
            client_cert=arguments.tls_client_cert,
            client_key=arguments.tls_client_key,
            server_name=arguments.server_name,
        )
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
