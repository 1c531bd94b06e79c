"""Callers share a server by who they are, not by how many connections they have; whoever floods it hurts itself."""

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import torch

from expertd.kernels.numerics.backend import TokenBatch, Underway
from expertd.proto import codec
from expertd.server.app import Server
from expertd.server.rpc.incoming import Incoming
from tests.support.certificates import Authority
from tests.support.serving import (
    Answers,
    execute_method,
    random_batch,
    request_for,
    running_server,
    stream_method,
    until,
)

ALL = range(16)
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
HONEST, RATE, SECONDS = 10, 15.0, 2.0
"""Callers, requests a second of each, and for how long."""
FLOODERS, IN_FLIGHT = 4, 6
"""Connections of one caller, and requests that each has on its way at all times."""
DEVICE_SECONDS, PATIENCE = 0.005, 5.0


def bearer(token: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {token}"),)


@contextlib.asynccontextmanager
async def connection(
    address: str, credentials: grpc.ChannelCredentials | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = (
        grpc.aio.insecure_channel(address, options)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, options)
    )
    async with channel:
        yield channel


async def identities(server: Server, *calls: tuple[grpc.aio.Channel, Any]) -> list[str]:
    """Of the callers of a stream and a unary call over each channel, with this metadata."""
    seen: list[str] = []

    async def note(incoming: Incoming) -> bytes:
        seen.append(incoming.identity)
        return await answers.real(incoming)

    answers = Answers(server, note)
    request = request_for(server, random_batch(1, 256, 16, 4))
    for channel, metadata in calls:
        await execute_method(channel)(request, metadata=metadata)
        stream = stream_method(channel)(metadata=metadata)
        await stream.write(request)
        assert (await stream.read()).partials
        assert seen[-1] == seen[-2]
    answers.leave()
    return seen[::2]


async def test_a_caller_is_its_token(small_model: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first-secret\nsecond-secret\n")
    async with (
        running_server(small_model, ALL, auth_token_file=tokens) as server,
        connection(str(server.address)) as one,
        connection(str(server.address)) as other,
    ):
        calls = ((one, bearer("first-secret")), (other, bearer("first-secret")), (one, bearer("second-secret")))
        first, again, second = await identities(server, *calls)
    assert first == again != second
    assert "secret" not in first + second


async def test_a_caller_is_its_certificate(small_model: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    options = {"tls_cert": certificate, "tls_key": key, "tls_client_ca": authority.pem}

    def credentials(name: str) -> grpc.ChannelCredentials:
        own, secret = authority.issue(name, host=f"{name}.example.org")
        return grpc.ssl_channel_credentials(authority.pem.read_bytes(), secret.read_bytes(), own.read_bytes())

    async with running_server(small_model, ALL, **options) as server, contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(connection(str(server.address), credentials(name)))
            for name in ("alpha", "beta", "alpha")
        ]
        # A token that nobody asked for proves nothing.
        alpha, beta, again = await identities(server, *((channel, bearer("any")) for channel in channels))
    assert alpha == again != beta
    assert "alpha.example.org" in alpha


async def test_a_caller_that_proves_nothing_is_its_address_or_its_user(small_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "expertd.sock"
    async with (
        running_server(small_model, ALL, unix_socket=path) as server,
        connection(str(server.address)) as one,
        connection(str(server.address)) as other,
        connection(f"unix:{path}") as local,
    ):
        found = await identities(server, (one, bearer("x")), (other, None), (local, None))
    assert found == ["ipv4:127.0.0.1", "ipv4:127.0.0.1", f"user {os.geteuid()}"]


async def test_lanes_are_their_tokens_too(small_model: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first-secret\n")
    async with (
        running_server(small_model, ALL, auth_token_file=tokens) as server,
        connection(str(server.address)) as channel,
    ):
        register: Any = channel.unary_unary(
            f"/{codec.SERVICE}/RegisterSharedMemory", response_deserializer=codec.Registration.FromString
        )
        registration = await register(b"", metadata=bearer("first-secret"))
        (over_grpc,) = await identities(server, (channel, bearer("first-secret")))
        assert server.handlers.tickets.redeem(registration.ticket).identity == over_grpc


class SlowDevice:
    """A device that takes its time, and no processor's."""

    def __init__(self, server: Server) -> None:
        submit = server.device.submit

        def slowly(layer: int, requests: Sequence[TokenBatch], reply_dtype: torch.dtype) -> Underway:
            time.sleep(DEVICE_SECONDS)
            return submit(layer, requests, reply_dtype)

        server.device.submit = slowly


async def offer(server: Server) -> Counter[str]:
    """What becomes of the calls of honest callers, each with a token and a connection of its own."""
    outcomes: Counter[str] = Counter()
    request = request_for(server, random_batch(4, 256, 16, 4))

    async def ask(method: Any, token: str) -> None:  # noqa: ANN401
        try:
            await method(request, metadata=bearer(token), timeout=PATIENCE)
        except grpc.aio.AioRpcError as error:
            outcomes[error.code().name] += 1
        else:
            outcomes["ok"] += 1

    async def caller(number: int) -> None:
        async with connection(str(server.address)) as channel, asyncio.TaskGroup() as asking:
            for _ in range(int(RATE * SECONDS)):
                asking.create_task(ask(execute_method(channel), f"honest-{number}"))
                await asyncio.sleep(1 / RATE)

    await asyncio.gather(*(caller(number) for number in range(HONEST)))
    return outcomes


@contextlib.asynccontextmanager
async def flood(server: Server) -> AsyncIterator[Counter[int]]:
    """One caller with many connections, which has more on its way than may wait; what became of its requests."""
    outcomes: Counter[int] = Counter()
    request = request_for(server, random_batch(32, 256, 16, 4))

    async def one(channel: grpc.aio.Channel) -> None:
        stream = stream_method(channel)(metadata=bearer("flooding"))
        for _ in range(IN_FLIGHT):
            await stream.write(request)
        while True:
            answer = await stream.read()
            outcomes[answer.error.code] += 1
            if answer.error.code:
                await asyncio.sleep(0.005)
            await stream.write(request)

    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(connection(str(server.address))) for _ in range(FLOODERS)]
        tasks = [asyncio.create_task(one(channel)) for channel in channels]
        await until(lambda: outcomes[EXHAUSTED] > 0)
        yield outcomes
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_honest_callers_beside_one_that_floods_keep_their_goodput(small_model: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("\n".join(["flooding", *(f"honest-{number}" for number in range(HONEST))]))
    options = {"max_tokens_per_request": 32, "max_batch_tokens": 64, "max_queued_tokens": 256}
    async with running_server(small_model, ALL, auth_token_file=tokens, **options) as server:
        SlowDevice(server)
        alone = await offer(server)
        async with flood(server) as flooded:
            beside = await offer(server)
        evicted = server.metrics.registry.get_sample_value("expertd_evictions_total")
    print(f"\nalone {dict(alone)}, beside a flood ({dict(flooded)}, {evicted:.0f} evicted) {dict(beside)}")
    assert beside["ok"] >= 0.9 * alone["ok"]
    assert evicted
