"""What follows servers in the background: it fails, is seen to fail, and goes on."""

from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from expertd.client.coordinator import Coordinator
from expertd.client.fleet.discovery import FileServers
from expertd.client.telemetry.metrics import CoordinatorMetrics
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import Unavailable
from tests.support.coordinators import QUICK, call, expected
from tests.support.fleets import computed_tokens, stop
from tests.support.serving import running_server, until

ALL = range(16)


def errors(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("expertd_coordinator_background_errors_total")


async def test_discovery_goes_on_after_a_server_that_could_not_be_reached_for_as_it_joined(
    small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()
    config = replace(QUICK, metrics=CoordinatorMetrics(registry))
    opened: list[str] = []

    def open_transport(address: str) -> GrpcTransport:
        opened.append(address)
        if len(opened) == 2:
            raise ValueError("root_ca ca.pem cannot be read: No such file or directory")
        return GrpcTransport(address)

    async with running_server(small_model, ALL) as first, running_server(small_model, ALL) as second:
        (tmp_path / "servers").write_text(f"{first.address}\n")
        discovery = FileServers(tmp_path / "servers", seconds=0.05)
        async with Coordinator(discovery, config, open_transport=open_transport) as moe:
            assert errors(registry) == 0
            (tmp_path / "servers").write_text(f"{first.address}\n{second.address}\n")
            await until(lambda: errors(registry) == 1)
            await until(lambda: len(moe._connected().membership.holdings.known[0]) == 2)
            await stop(first)
            assert relative_error(await call(moe), expected(small_model)) < 1e-5
            assert computed_tokens(second) > 0
    assert opened[1:] == [str(second.address)] * 2
    assert "looking for servers in FileServers" in caplog.text
    assert "ValueError: root_ca ca.pem cannot be read" in caplog.text


class OnceBlind(GrpcTransport):
    """Fails to watch its server the first time."""

    async def until_not_serving(self) -> Unavailable:
        watched, self.watched = getattr(self, "watched", False), True
        if not watched:
            raise LookupError("an answer that nobody thought of")
        return await super().until_not_serving()


async def test_a_server_is_watched_again_after_watching_it_failed(
    small_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()
    config = replace(QUICK, metrics=CoordinatorMetrics(registry))
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], config, open_transport=OnceBlind) as moe,
    ):
        await until(lambda: errors(registry) == 1)
        await call(moe)
        assert moe.backends == {"torch"}
        await stop(server)
        # Nobody calls: who watches it has to notice.
        await until(lambda: not moe.backends)
        assert errors(registry) == 1
    assert f"watching {server.address} failed and begins again in about 0.25 s" in caplog.text
    assert "LookupError: an answer that nobody thought of" in caplog.text
