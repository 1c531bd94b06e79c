"""Servers of chaos tests whose experts or weights are changed, and what they tell of them."""

from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.proto.codec import ShardInfo
from tests.chaos.fleet import ServerProcess

ADMIN = ("--admin-listen", "127.0.0.1:0")


async def look(server: ServerProcess) -> ShardInfo:
    transport = GrpcTransport(server.address)
    try:
        return await transport.get_shard(10.0)
    finally:
        await transport.close()
