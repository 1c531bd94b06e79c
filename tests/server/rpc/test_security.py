"""Who may call a server: certificates, tokens, plaintext; and what a change of their files does."""

import asyncio
import contextlib
import dataclasses
import datetime
import logging
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.telemetry.metrics import CoordinatorMetrics
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.security import ClientSecurity
from expertd.proto import codec
from expertd.proto.base.errors import Unauthenticated, Unavailable
from expertd.server.app import Server
from expertd.server.options.config import Address
from tests.support.certificates import DAY, Authority
from tests.support.coordinators import QUICK, call
from tests.support.fleets import stop
from tests.support.serving import (
    execute_method,
    open_channel,
    random_batch,
    request_for,
    running_server,
    stream_method,
    until,
)

TOKEN, OTHER_TOKEN = "Zr0-first-secret", "Zr0-second-secret"


class Fixture:
    """Authorities, files of a server, and clients that it accepts."""

    def __init__(self, folder: Path) -> None:
        self.authority, self.stranger = Authority(folder), Authority(folder, "stranger")
        self.server_cert, self.server_key = self.authority.issue("server")
        self.client_cert, self.client_key = self.authority.issue("client")
        self.client_ca = Path(shutil.copy(self.authority.pem, folder / "client-ca.pem"))
        self.tokens = folder / "tokens"
        self.tokens.write_text(f"{TOKEN}\n{OTHER_TOKEN}\n")

    def mutual_tls(self) -> dict[str, Path]:
        return {"tls_cert": self.server_cert, "tls_key": self.server_key, "tls_client_ca": self.client_ca}

    def client(self, **changes: Any) -> ClientSecurity:  # noqa: ANN401
        accepted = {"root_ca": self.authority.pem, "client_cert": self.client_cert, "client_key": self.client_key}
        return ClientSecurity(**(accepted | changes))


@pytest.fixture
def files(tmp_path: Path) -> Fixture:
    return Fixture(tmp_path)


@contextlib.asynccontextmanager
async def connection(server: Server, security: ClientSecurity) -> AsyncIterator[GrpcTransport]:
    transport = GrpcTransport(str(server.address), 1, security)
    try:
        yield transport
    finally:
        await transport.close()


async def connect(server: Server, security: ClientSecurity) -> None:
    """One `GetShard` over a connection of its own."""
    async with connection(server, security) as transport:
        assert (await transport.get_shard(5.0)).backend == "torch"


async def refusal(server: Server, security: ClientSecurity) -> str:
    """Why the first attempt to connect fails, in the client's words."""
    async with security.open_channel(str(server.address), [("grpc.use_local_subchannel_pool", 1)]) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/{codec.SERVICE}/GetShard", codec.ShardRequest.SerializeToString)(
                codec.ShardRequest(), timeout=10
            )
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    return str(caught.value.details())


async def test_a_coordinator_computes_over_mutual_tls_with_a_token(small_model: Path, files: Fixture) -> None:
    config = CoordinatorConfig(security=files.client(token=OTHER_TOKEN))
    hidden, ids = torch.randn(9, 256), torch.arange(4).expand(9, 4)
    async with (
        running_server(small_model, range(16)) as plain,
        running_server(small_model, range(16), auth_token_file=files.tokens, **files.mutual_tls()) as server,
        Coordinator([str(plain.address)]) as expected,
        Coordinator([str(server.address)], config) as moe,
    ):
        assert str(server.security) == "mutual TLS, bearer token"
        result = await moe(1, hidden, topk_ids=ids, topk_weights=torch.ones(9, 4))
        assert torch.equal(result, await expected(1, hidden, topk_ids=ids, topk_weights=torch.ones(9, 4)))


async def test_clients_without_a_valid_certificate_are_refused_and_the_log_says_why(
    small_model: Path, files: Fixture, capfd: pytest.CaptureFixture[str]
) -> None:
    expired_cert, expired_key = files.authority.issue("expired", lasts=-DAY)
    foreign_cert, foreign_key = files.stranger.issue("foreign")
    refused = {
        "PEER_DID_NOT_RETURN_A_CERTIFICATE": files.client(client_cert=None, client_key=None),
        "certificate has expired": files.client(client_cert=expired_cert, client_key=expired_key),
        "unable to get local issuer certificate": files.client(client_cert=foreign_cert, client_key=foreign_key),
        "WRONG_VERSION_NUMBER": ClientSecurity(),
    }
    async with running_server(small_model, range(16), **files.mutual_tls()) as server:
        for reason, security in refused.items():
            capfd.readouterr()
            assert "failed to connect" in await refusal(server, security)
            assert reason in capfd.readouterr().err
        await connect(server, files.client())


@pytest.mark.parametrize(
    ("issuer", "host", "lasts", "reason"),
    [
        ("authority", "127.0.0.1", -DAY, "certificate has expired"),
        ("authority", "example.org", DAY, "Hostname Verification Check failed"),
        ("stranger", "127.0.0.1", DAY, "unable to get local issuer certificate"),
    ],
    ids=["expired", "wrong name", "another authority"],
)
async def test_clients_refuse_a_server_that_cannot_prove_itself(
    small_model: Path,
    files: Fixture,
    issuer: str,
    host: str,
    lasts: datetime.timedelta,
    reason: str,
) -> None:
    cert, key = getattr(files, issuer).issue("doubtful", host=host, lasts=lasts)
    async with running_server(small_model, range(16), tls_cert=cert, tls_key=key) as server:
        assert reason in await refusal(server, ClientSecurity(root_ca=files.authority.pem))


async def test_a_certificate_for_another_name_is_accepted_when_the_client_expects_that_name(
    small_model: Path, files: Fixture
) -> None:
    cert, key = files.authority.issue("named", host="node0.example.org")
    async with running_server(small_model, range(16), tls_cert=cert, tls_key=key) as server:
        await connect(server, ClientSecurity(root_ca=files.authority.pem, server_name="node0.example.org"))


async def test_a_client_authority_that_is_replaced_revokes_its_clients_without_restart(
    small_model: Path, files: Fixture, capfd: pytest.CaptureFixture[str]
) -> None:
    new_cert, new_key = files.stranger.issue("new-client")
    new_client = files.client(client_cert=new_cert, client_key=new_key)
    async with running_server(small_model, range(16), **files.mutual_tls()) as server:
        await connect(server, files.client())
        await refusal(server, new_client)
        replace(files.client_ca, files.stranger.pem.read_bytes())
        capfd.readouterr()
        assert "failed to connect" in await refusal(server, files.client())
        assert "unable to get local issuer certificate" in capfd.readouterr().err
        await connect(server, new_client)


async def test_a_renewed_server_certificate_is_used_without_restart_and_an_unusable_one_is_not(
    small_model: Path, files: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    security = ClientSecurity(root_ca=files.authority.pem)
    renewed_cert, renewed_key = files.stranger.issue("renewed")
    by_stranger = ClientSecurity(root_ca=files.stranger.pem)
    async with running_server(small_model, range(16), tls_cert=files.server_cert, tls_key=files.server_key) as server:
        replace(files.server_cert, renewed_cert.read_bytes())
        for _ in range(2):
            await connect(server, security)
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        complaints = [record.getMessage() for record in errors if record.name.startswith("expertd")]
        assert len(complaints) == 1
        assert "the former content stays in force: --tls-cert" in complaints[0]
        assert "KEY_VALUES_MISMATCH" in complaints[0].upper().replace(" ", "_")
        replace(files.server_key, renewed_key.read_bytes())
        await connect(server, by_stranger)
        assert "unable to get local issuer certificate" in await refusal(server, security)
        files.server_key.unlink()
        await connect(server, by_stranger)


async def test_a_coordinator_whose_certificate_expired_goes_on_with_the_one_that_took_its_place(
    small_model: Path, files: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    registry = CollectorRegistry()
    mine, key = files.authority.issue("mine", lasts=datetime.timedelta(seconds=4))
    expires = datetime.datetime.now().timestamp() + 4
    security = files.client(client_cert=mine, client_key=key)
    config = dataclasses.replace(QUICK, security=security, metrics=CoordinatorMetrics(registry), owner_timeout=0.1)

    def end(file: str) -> float:
        told = registry.get_sample_value("expertd_coordinator_certificate_expiry_timestamp_seconds", {"file": file})
        assert told is not None
        return told

    async with contextlib.AsyncExitStack() as stack:
        former = await stack.enter_async_context(running_server(small_model, range(16), **files.mutual_tls()))
        told = former.metrics.registry.get_sample_value
        for option in ("tls_cert", "tls_client_ca"):
            ends = told("expertd_certificate_expiry_timestamp_seconds", {"file": option})
            assert ends is not None
            assert abs(ends - expires - DAY.total_seconds()) < 60
        moe = await stack.enter_async_context(Coordinator([str(former.address)], config))
        await call(moe)
        assert abs(end("client_cert") - expires) < 2
        assert abs(end("root_ca") - expires - DAY.total_seconds()) < 60
        await stop(former)
        await asyncio.sleep(max(0.0, expires + 1 - datetime.datetime.now().timestamp()))
        listen = Address("127.0.0.1", former.address.port)
        await stack.enter_async_context(running_server(small_model, range(16), listen=listen, **files.mutual_tls()))
        with pytest.raises(Unavailable):
            await call(moe)
        renewed, renewed_key = files.authority.issue("renewed")
        replace(mine, renewed.read_bytes())
        # The key comes later, and is not missed.
        await until(lambda: "the former certificates stay in force: client_cert" in caplog.text)
        assert not moe.backends
        replace(key, renewed_key.read_bytes())
        await until(lambda: bool(moe.backends))
        assert (await call(moe)).isfinite().all()
        assert end("client_cert") > expires + 3600
    assert caplog.text.count("the former certificates stay in force") == 1


def replace(path: Path, content: bytes) -> None:
    """Put a new file in the place of `path`, as tools that renew certificates do."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)


async def test_calls_without_the_right_token_are_refused_with_the_reason(small_model: Path, files: Fixture) -> None:
    async with running_server(small_model, range(16), auth_token_file=files.tokens) as server:
        for token in (TOKEN, OTHER_TOKEN):
            await connect(server, ClientSecurity(token=token))
        for security, reason in (
            (ClientSecurity(), "authorization is missing; send the metadata 'authorization: Bearer TOKEN'"),
            (ClientSecurity(token=TOKEN + "x"), "authorization holds no bearer token that this server accepts"),
            (ClientSecurity(token=TOKEN[:-1]), "authorization holds no bearer token that this server accepts"),
        ):
            async with connection(server, security) as transport:
                with pytest.raises(Unauthenticated, match=reason) as caught:
                    await transport.get_shard(5.0)
            assert TOKEN[:-1] not in str(caught.value)


async def test_every_rpc_but_health_wants_the_token(small_model: Path, files: Fixture) -> None:
    async with (
        running_server(small_model, range(16), auth_token_file=files.tokens) as server,
        open_channel(server) as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=codec.SERVICE))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        request = request_for(server, random_batch(1, 256, 16, 4))
        right = (("authorization", f"Bearer {TOKEN}"),)
        assert (await execute_method(channel)(request, metadata=right)).partials
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
        get_shard = channel.unary_unary(
            f"/{codec.SERVICE}/GetShard", codec.ShardRequest.SerializeToString, codec.ShardResponse.FromString
        )
        for scheme in ("Basic", ""):
            metadata = (("authorization", f"{scheme} {TOKEN}"),)
            asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            calls: tuple[Any, ...] = (
                execute_method(channel)(request, metadata=metadata),
                stream_method(channel)(metadata=metadata).read(),
                get_shard(codec.ShardRequest(), metadata=metadata),
                reflection.ServerReflectionInfo(asked, metadata=metadata).read(),
            )
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_tokens_are_exchanged_without_restart_and_never_logged(
    small_model: Path, files: Fixture, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    mine = tmp_path / "mine"
    mine.write_text(TOKEN + "\n")
    security = ClientSecurity(token_file=mine)
    async with (
        running_server(small_model, range(16), auth_token_file=files.tokens) as server,
        connection(server, security) as transport,
    ):
        await transport.get_shard(5.0)
        replace(files.tokens, b"Zr0-third-secret")
        with pytest.raises(Unauthenticated):
            await transport.get_shard(5.0)
        mine.write_text("Zr0-third-secret")
        await transport.get_shard(5.0)
        replace(files.tokens, b"\n")
        await transport.get_shard(5.0)
        assert f"--auth-token-file {files.tokens} is empty" in caplog.text
    assert "Zr0" not in caplog.text + repr(server.config) + repr(security) + repr(ClientSecurity(token=TOKEN))


async def test_more_than_max_connections_are_closed_until_others_end(small_model: Path) -> None:
    async def connects(server: Server) -> tuple[grpc.aio.Channel, bool]:
        channel = grpc.aio.insecure_channel(str(server.address), [("grpc.use_local_subchannel_pool", 1)])
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError:
            # It would go on trying, and take a place that another one leaves.
            await channel.close()
            return channel, False
        return channel, True

    async with running_server(small_model, range(16), max_connections=2) as server:
        (first, connected), (second, also) = await connects(server), await connects(server)
        assert connected
        assert also
        assert not (await connects(server))[1]
        await first.close()
        for _ in range(20):
            third, connected = await connects(server)
            if connected:
                break
            await asyncio.sleep(0.5)
        assert connected
        await second.close()
        await third.close()


async def test_a_connection_carries_at_most_max_streams_calls_at_once(small_model: Path) -> None:
    async with running_server(small_model, range(16), max_streams=2) as server, open_channel(server) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        for watch in watches:
            await watch.read()
        third = health.Watch(health_pb2.HealthCheckRequest())
        waiting = asyncio.create_task(third.read())
        assert not (await asyncio.wait((waiting,), timeout=0.3))[0]
        watches[0].cancel()
        assert (await asyncio.wait_for(waiting, 5)).status == health_pb2.HealthCheckResponse.SERVING
        third.cancel()
        watches[1].cancel()
