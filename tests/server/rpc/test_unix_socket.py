"""gRPC over a unix socket: the same service, for processes of this user."""

import asyncio
import socket
import stat
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.transport.security import ClientSecurity
from expertd.proto.base.errors import Unauthenticated
from expertd.server.assembly import assemble
from expertd.server.options.config import InvalidOption, ServerConfig
from expertd.server.rpc.incoming import Incoming
from expertd.server.telemetry.metrics import Metrics
from tests.support.certificates import Authority
from tests.support.serving import ANY_PORT, Answers, running_server

ALL = range(16)
HIDDEN, IDS, WEIGHTS = torch.randn(9, 256), torch.arange(4).expand(9, 4), torch.ones(9, 4)


async def test_results_are_those_of_tcp_and_the_socket_is_this_users_alone(small_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "expertd.sock"
    async with (
        running_server(small_model, ALL, unix_socket=path) as server,
        Coordinator([str(server.address)]) as over_tcp,
        Coordinator([f"unix:{path}"]) as over_unix,
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        expected = await over_tcp(1, HIDDEN, topk_ids=IDS, topk_weights=WEIGHTS)
        assert torch.equal(await over_unix(1, HIDDEN, topk_ids=IDS, topk_weights=WEIGHTS), expected)
    assert not path.exists()


async def test_streams_of_one_socket_are_callers_of_their_own(small_model: Path, tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'expertd.sock'}"
    async with running_server(small_model, ALL, unix_socket=tmp_path / "expertd.sock") as server:
        callers = []

        async def note(incoming: Incoming) -> bytes:
            callers.append(incoming.caller)
            return await answers.real(incoming)

        answers = Answers(server, note)
        for _ in range(2):
            async with Coordinator([address], CoordinatorConfig(channels=1, shared_memory_bytes=0)) as moe:
                for _ in range(2):
                    await moe(1, HIDDEN, topk_ids=IDS, topk_weights=WEIGHTS)
    assert callers[0] == callers[1] != callers[2] == callers[3]


async def test_tokens_are_asked_for_and_tls_is_not_spoken(small_model: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    tokens = tmp_path / "tokens"
    tokens.write_text("first-secret")
    address = f"unix:{tmp_path / 'expertd.sock'}"
    options = {"tls_cert": cert, "tls_key": key, "auth_token_file": tokens, "unix_socket": tmp_path / "expertd.sock"}
    async with running_server(small_model, ALL, **options):
        with pytest.raises(Unauthenticated, match="authorization is missing"):
            await Coordinator([address]).__aenter__()
        security = ClientSecurity(root_ca=authority.pem, token="first-secret")
        async with Coordinator([address], CoordinatorConfig(security=security)) as moe:
            assert moe.backends == {"torch"}


async def test_a_socket_in_use_is_refused_and_one_left_behind_is_taken_over(small_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "expertd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with running_server(small_model, ALL, unix_socket=path):
        config = ServerConfig(model=small_model, experts=(0,), listen=ANY_PORT, metrics=ANY_PORT, unix_socket=path)
        with pytest.raises(InvalidOption, match=rf"--unix-socket {path} is in use"):
            await assemble(config, Metrics(CollectorRegistry())).run()
        _, writer = await asyncio.open_unix_connection(path)
        writer.close()


async def test_a_path_that_cannot_be_bound_is_refused(small_model: Path, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    config = ServerConfig(model=small_model, experts=(0,), listen=ANY_PORT, metrics=ANY_PORT, unix_socket=long)
    with pytest.raises(InvalidOption, match=r"--unix-socket .*xxx cannot be bound"):
        await assemble(config, Metrics(CollectorRegistry())).run()
