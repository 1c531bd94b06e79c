"""Messages that cost more than they are worth: refused before anybody pays for them."""

import asyncio
import gzip
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2

from expertd.proto import codec
from expertd.proto.codec.wire import BYTES, VARINT, tag, varint
from expertd.server.app import Server
from expertd.server.rpc.limits import MOST_BYTES
from tests.support.serving import execute_method, open_channel, random_batch, request_for, running_server

LONG = 30 << 20
UNKNOWN = 2000
"""A field that no message has."""
TINY = tag(UNKNOWN, VARINT) + b"\1"
FIELDS = TINY * (LONG // len(TINY))
"""Millions of them."""
ONE_FIELD = tag(UNKNOWN, BYTES) + varint(LONG) + bytes(LONG)
HEALTH = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/Check"
SMALL = (*(f"/{codec.SERVICE}/{name}" for name in ("GetShard", "VerifyShard", "RegisterSharedMemory")), HEALTH)
MOST_LAG = 0.01
TRIES = 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(small_model: Path) -> AsyncIterator[Server]:
    # So that messages may be as long: four bytes a value for each token.
    tokens = LONG // 1024 + 1
    async with running_server(
        small_model, range(16), max_tokens_per_request=tokens, max_batch_tokens=tokens, max_queued_tokens=tokens
    ) as server:
        yield server


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def refusal(channel: grpc.aio.Channel, method: str, message: bytes) -> grpc.aio.AioRpcError:
    start: Any = channel.unary_stream(method)
    call = start(message)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value


async def lag(work: Callable[[], Awaitable[object]]) -> float:
    """The longest that the event loop lets wait who is due while `work` goes on."""
    longest = 0.0

    async def probe() -> None:
        nonlocal longest
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - due)

    probing = asyncio.create_task(probe())
    await work()
    # For who has been kept waiting until now.
    await asyncio.sleep(0.01)
    probing.cancel()
    return longest


@pytest.mark.parametrize("method", SMALL)
async def test_requests_without_tensors_are_bounded_before_they_are_parsed(server: Server, method: str) -> None:
    async with open_channel(server) as channel:
        error = await refusal(channel, method, TINY * (MOST_BYTES // len(TINY) + 1))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert f"at most {MOST_BYTES} are read" in str(error.details())
        error = await refusal(channel, method, b"\xff")
        if method == HEALTH:
            # It knows two requests, and reads no others.
            assert error.code() == grpc.StatusCode.NOT_FOUND
            return
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "the 1 bytes received cannot be read" in str(error.details())


async def test_reflection_is_bounded_too(server: Server) -> None:
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    async with open_channel(server) as channel:
        error = await refusal(channel, method, bytes(MOST_BYTES + 1))
        assert f"at most {MOST_BYTES} are read" in str(error.details())


async def test_millions_of_fields_delay_others_no_more_than_as_many_bytes(server: Server) -> None:
    async with open_channel(server) as channel:

        async def least_lag(method: str, message: bytes, enough: float) -> float:
            # The least of some: what else the machine does is not the server's.
            least = math.inf
            for _ in range(TRIES):
                least = min(least, await lag(lambda: refusal(channel, method, message)))
                if least < enough:
                    break
            return least

        execute = f"/{codec.SERVICE}/Execute"
        # What gRPC takes for receiving it; nothing of it is looked at but the one field.
        received = await least_lag(execute, ONE_FIELD, 0.0)
        lags = {method: await least_lag(method, FIELDS, received + MOST_LAG) for method in (execute, *SMALL)}
    print(f"\n{LONG >> 20} MiB: {received * 1e3:.1f} ms to receive; {lags}")
    assert max(lags.values()) < received + MOST_LAG


async def test_compressed_messages_are_refused(server: Server) -> None:
    assert len(gzip.compress(ONE_FIELD)) < 32 << 10
    async with open_channel(server) as channel:
        method: Any = channel.unary_unary(f"/{codec.SERVICE}/Execute")
        for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            with pytest.raises(grpc.aio.AioRpcError, match="is disabled") as caught:
                await method(ONE_FIELD, compression=compression)
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert (await execute_method(channel)(request_for(server, random_batch(1, 256, 16, 4)))).partials


async def test_what_is_beside_the_tensors_is_bounded_as_it_waits_with_them(server: Server) -> None:
    good = request_for(server, random_batch(1, 256, 16, 4)).SerializeToString()
    async with open_channel(server) as channel:
        method: Any = channel.unary_unary(f"/{codec.SERVICE}/Execute")
        assert await method(good + tag(UNKNOWN, BYTES) + varint(60_000) + bytes(60_000))
        with pytest.raises(grpc.aio.AioRpcError, match=r"bytes beside its tensors; at most 65536 are taken") as caught:
            await method(good + tag(UNKNOWN, BYTES) + varint(70_000) + bytes(70_000))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
