"""The gRPC door closes while callers hold calls open."""

import asyncio
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2

from expertd.server.options.config import Address
from expertd.server.rpc.door import GrpcDoor
from expertd.server.rpc.execution import ExecuteHandlers
from expertd.server.rpc.health import SERVICE, Health
from expertd.server.rpc.identity import Identities
from tests.support.serving import ANY_PORT

ROUNDS = 600
WATCH = f"/{SERVICE}/Watch"


def add_port(server: grpc.aio.Server, address: Address) -> int:
    return server.add_insecure_port(str(address))


async def test_whoever_watches_health_is_cut_off_however_little_time_the_drain_has() -> None:
    nobody: Any = None

    def make() -> grpc.aio.Server:
        server = grpc.aio.server()
        Health().register(server)
        return server

    for round_ in range(ROUNDS):
        door = GrpcDoor(ANY_PORT, ExecuteHandlers(nobody, 1 << 20, Identities(by_token=False)), make, add_port)
        door.bind()
        await door.listen()
        async with grpc.aio.insecure_channel(str(door.address)) as channel:
            method: Any = channel.unary_stream(WATCH)
            watch = method(health_pb2.HealthCheckRequest().SerializeToString())
            await anext(aiter(watch))
            # A grace of gRPC's own that ends while the door closes has it use a server that it has freed.
            await door.drain(round_ % 100 * 2e-5)
            await asyncio.wait_for(door.close(), 5)
            assert await watch.code() != grpc.StatusCode.OK
