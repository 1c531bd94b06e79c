"""Several servers in this process, and what becomes of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from expertd.server.app import Server
from tests.support.serving import running_server

HALVES = (range(8), range(8, 16))


@contextlib.asynccontextmanager
async def running_servers(model: Path, shards: Sequence[range], **options: Any) -> AsyncIterator[list[Server]]:  # noqa: ANN401
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(running_server(model, shard, **options)) for shard in shards]


@contextlib.asynccontextmanager
async def running_replicas(model: Path, count: int = 2, **options: Any) -> AsyncIterator[list[list[Server]]]:  # noqa: ANN401
    """`count` servers for each half of the experts."""
    async with contextlib.AsyncExitStack() as stack:
        yield [
            [await stack.enter_async_context(running_server(model, half, **options)) for _ in range(count)]
            for half in HALVES
        ]


def addresses(servers: Sequence[Server]) -> list[str]:
    return [str(server.address) for server in servers]


def flat(replicas: list[list[Server]]) -> list[str]:
    return addresses([server for half in replicas for server in half])


def computed_tokens(server: Server) -> float:
    return server.metrics.registry.get_sample_value("expertd_tokens_total") or 0.0


async def stop(server: Server) -> None:
    """Stop a server and wait until nobody listens on its ports any more."""
    server.stop()
    for address in (server.address, server.metrics_address):
        with contextlib.suppress(ConnectionError):
            while True:
                _, writer = await asyncio.open_connection(address.host, address.port)
                writer.close()
                await asyncio.sleep(0.02)
