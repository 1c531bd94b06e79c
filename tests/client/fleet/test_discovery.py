"""Servers that are found: in a file that changes, and under a name with several addresses."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from expertd.client.coordinator import Coordinator
from expertd.client.fleet.discovery import DnsServers, FileServers
from expertd.client.telemetry.metrics import CoordinatorMetrics
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import Unavailable
from expertd.server.app import Server
from expertd.server.options.config import Address
from tests.support.certificates import Authority
from tests.support.coordinators import EXACT, call, expected
from tests.support.fleets import computed_tokens, stop
from tests.support.serving import running_server

QUICK = replace(EXACT, connect_timeout=2.0)


async def until(true: Callable[[], bool], moe: Coordinator, model: Path) -> None:
    """Call until it is so; every result must be right."""
    async with asyncio.timeout(20):
        while not true():
            outputs = await asyncio.gather(*(call(moe, seed) for seed in range(4)))
            for seed, output in enumerate(outputs):
                assert relative_error(output, expected(model, seed)) < 1e-5


async def test_servers_of_a_file_join_and_leave_while_calls_run(small_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "servers"

    def write(*servers: Server) -> None:
        lines = ["# the servers", "", *(f"{server.address}  # one" for server in servers)]
        file.with_suffix(".new").write_text("\n".join(lines))
        file.with_suffix(".new").replace(file)

    async with running_server(small_model, range(16)) as first, running_server(small_model, range(16)) as second:
        write(first)
        async with Coordinator(FileServers(file, seconds=0.05), QUICK) as moe:
            await call(moe)
            write(first, second)
            await until(lambda: computed_tokens(second) > 0, moe, small_model)
            for unusable in ("", "node0\n"):
                file.write_text(unusable)
                await asyncio.sleep(0.2)
                await call(moe)
            write(second)
            await asyncio.sleep(0.5)
            before = computed_tokens(first)
            await until(lambda: computed_tokens(second) > 400, moe, small_model)
            assert computed_tokens(first) == before


async def test_files_that_vanish_and_return_while_a_server_joins_do_not_end_the_search(
    small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority, file, registry = Authority(tmp_path), tmp_path / "servers", CollectorRegistry()
    certificate, key = authority.issue("server")
    metrics, security = CoordinatorMetrics(registry), ClientSecurity(root_ca=authority.pem)

    def count(what: str) -> float:
        return registry.get_sample_value(f"expertd_coordinator_background_{what}_total") or 0.0

    def tls_server() -> Any:  # noqa: ANN401
        return running_server(small_model, range(16), tls_cert=certificate, tls_key=key)

    async with tls_server() as first, tls_server() as second:
        file.write_text(f"{first.address}\n")
        config = replace(QUICK, metrics=metrics, security=security)
        async with Coordinator(FileServers(file, seconds=0.05), config) as moe:
            file.rename(tmp_path / "away")
            await asyncio.sleep(0.3)
            assert "the servers stay as they are" in caplog.text
            # It is found again, and with it a server that nobody can connect to now.
            hidden = authority.pem.rename(tmp_path / "hidden")
            (tmp_path / "away").write_text(f"{first.address}\n{second.address}\n")
            (tmp_path / "away").rename(file)
            await until(lambda: count("restarts") >= 1, moe, small_model)
            assert count("errors") >= 1
            assert f"looking for servers in {FileServers(file, 0.05)} failed" in caplog.text
            hidden.rename(authority.pem)
            await until(lambda: computed_tokens(second) > 0, moe, small_model)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("# nobody\n", "names no server; write one host:port a line"), ("node0:x\n", "has 'node0:x', which is not")],
)
async def test_a_file_without_servers_is_an_error_at_the_start(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "servers").write_text(content)
    with pytest.raises(Unavailable, match=f"no server found: .*{complaint}"):
        await Coordinator(FileServers(tmp_path / "servers")).__aenter__()
    with pytest.raises(Unavailable, match="No such file"):
        await Coordinator(FileServers(tmp_path / "nothing")).__aenter__()


async def test_a_file_may_name_unix_sockets(small_model: Path, tmp_path: Path) -> None:
    file, sockets = tmp_path / "servers", [tmp_path / "low.sock", tmp_path / "high.sock"]
    file.write_text("".join(f"unix:{socket}  # on this machine\n" for socket in sockets))
    async with (
        running_server(small_model, range(8), unix_socket=sockets[0]),
        running_server(small_model, range(8, 16), unix_socket=sockets[1]),
        Coordinator(FileServers(file), QUICK) as moe,
    ):
        assert relative_error(await call(moe), expected(small_model)) < 1e-5


async def test_all_addresses_of_a_name_are_servers_and_those_that_change_are_followed(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = ["127.0.0.1", "127.0.0.2"]
    real = socket.getaddrinfo

    def resolve(host: object, *arguments: Any, **options: Any) -> list[Any]:  # noqa: ANN401
        if host != "experts.test":
            return real(host, *arguments, **options)  # type: ignore[arg-type]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in [*hosts, *hosts]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    async with running_server(small_model, range(8)) as first:
        port = first.address.port

        def at(host: str, experts: range) -> Any:  # noqa: ANN401
            return running_server(small_model, experts, listen=Address(host, port))

        async with (
            at("127.0.0.2", range(8, 16)) as second,
            Coordinator(DnsServers("experts.test", port, seconds=0.1), QUICK) as moe,
        ):
            assert relative_error(await call(moe), expected(small_model)) < 1e-5
            async with at("127.0.0.3", range(8, 16)) as third:
                hosts[:] = ["127.0.0.1", "127.0.0.3"]
                await until(lambda: computed_tokens(third) > 0, moe, small_model)
                await stop(second)
                assert relative_error(await call(moe), expected(small_model)) < 1e-5
