"""What those can do to a server who prove nothing: connect and be silent, ask and not read, ask for much."""

import asyncio
import contextlib
import resource
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.security import ClientSecurity
from tests.support.certificates import Authority
from tests.support.process import Serving, serving

FEW = ("--max-connections", "16")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
ACK = bytes([0, 0, 0, SETTINGS, 1, 0, 0, 0, 0])
KEPT_BYTES = 100 << 20


@contextlib.contextmanager
def connections(address: str, count: int, says: bytes = b"") -> Iterator[list[socket.socket]]:
    """Opened, each with the same first words and nothing more."""
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(count)]
        for connection in opened:
            connection.sendall(says)
        yield opened


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def get(url: str, timeout: float = 10.0) -> str:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return str(answer.read(), "utf-8")


async def until_let_in(server: Serving, security: ClientSecurity) -> float:
    """Seconds until somebody who has something to say is answered."""
    started = time.monotonic()
    while True:
        transport = GrpcTransport(server.listen, 1, security)
        try:
            await transport.get_shard(5.0)
        except Exception:
            assert time.monotonic() - started < 60
            await asyncio.sleep(0.2)
        else:
            return time.monotonic() - started
        finally:
            await transport.close()


@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "TLS"])
async def test_silent_connections_keep_others_out_for_seconds_alone(
    small_model: Path, tmp_path: Path, tls: bool
) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    options = ("--tls-cert", str(certificate), "--tls-key", str(key)) if tls else ()
    security = ClientSecurity(root_ca=authority.pem) if tls else ClientSecurity()
    with serving(small_model, tmp_path, *FEW, *options) as server, connections(server.listen, 16):
        assert await until_let_in(server, security) < 12


async def test_connections_without_a_call_are_closed(small_model: Path, tmp_path: Path) -> None:
    quickly = {"rpc.limits.IDLE_MS": 1000}
    hello = PREFACE + frame(SETTINGS, 0, 0, b"") + ACK
    with (
        serving(small_model, tmp_path, *FEW, constants=quickly) as server,
        connections(server.listen, 16, hello),
    ):
        assert await until_let_in(server, ClientSecurity()) < 12


def test_the_metrics_port_answers_beside_idle_connections_and_slow_ones(small_model: Path, tmp_path: Path) -> None:
    # Those here are twice as many as this process may have open by default.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with serving(small_model, tmp_path) as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (1024, 1024))
        with (
            connections(server.metrics, 1007),
            connections(server.metrics, 1007, b"GET /metrics HTTP/1.1\r\nX: "),
        ):
            for path, text in (("healthz", "alive"), ("readyz", "ready"), ("metrics", "expertd_ready 1.0")):
                # The first one waits for its turn behind all of them.
                assert text in get(f"{server.site}/{path}")
            assert len(list(Path(f"/proc/{server.process.pid}/task").iterdir())) < 100


def test_a_connection_to_the_metrics_port_ends_by_itself(small_model: Path, tmp_path: Path) -> None:
    quickly = {"telemetry.http_port.SECONDS": 0.5}
    with (
        serving(small_model, tmp_path, constants=quickly) as server,
        connections(server.metrics, 3) as silent,
        connections(server.metrics, 1, b"GET / HTTP/1.1\r\nX: " + b"x" * (32 << 10)) as talkative,
    ):
        for connection in (*silent, *talkative):
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""


async def test_watches_of_unknown_names_are_not_kept(small_model: Path, tmp_path: Path) -> None:
    with serving(small_model, tmp_path) as server:
        async with grpc.aio.insecure_channel(server.listen) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
            before = memory_of(server)
            # A long name, and no name with a field that nobody knows.
            for field in [b"\x0a", b"\x7a"] * 25:
                long = health_pb2.HealthCheckRequest.FromString(field + b"\xa0\xf7\x36" + b"x" * 900_000)
                watches = [health.Watch(long) for _ in range(20)]
                for watch in watches:
                    with pytest.raises(grpc.aio.AioRpcError, match="at most 65536 are read") as caught:
                        await watch.read()
                    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError, match="service is unknown") as caught:
                await health.Watch(health_pb2.HealthCheckRequest(service="x" * 60_000)).read()
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
            assert memory_of(server) - before < KEPT_BYTES


def memory_of(server: Serving) -> int:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def test_whoever_watches_health_and_does_not_read_holds_nobody_up(small_model: Path, tmp_path: Path) -> None:
    # A window of nothing: what the server has to say cannot be sent.
    settings = frame(SETTINGS, 0, 0, (4).to_bytes(2) + (0).to_bytes(4))
    path, kind = b"/grpc.health.v1.Health/Watch", b"application/grpc"
    headers = b"\x83\x86\x04" + bytes([len(path)]) + path + b"\x01\x01h\x0f\x10" + bytes([len(kind)]) + kind
    headers += b"\x00\x02te\x08trailers"
    call = frame(HEADERS, 4, 1, headers) + frame(DATA, 1, 1, bytes(5))
    stuck = PREFACE + settings + ACK + call
    with (
        serving(small_model, tmp_path, "--drain-seconds", "3") as server,
        connections(server.listen, 1, stuck) as (connection,),
    ):
        async with grpc.aio.insecure_channel(server.listen) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            # Its headers came, so that it is being answered.
            assert b"application/grpc" in await asyncio.to_thread(until_said, connection, b"application/grpc")
            server.process.send_signal(signal.SIGTERM)
            answer = await asyncio.wait_for(watch.read(), 5)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await asyncio.to_thread(server.process.wait, 20) == 0


def until_said(connection: socket.socket, words: bytes) -> bytes:
    heard = b""
    while words not in heard:
        more = connection.recv(4096)
        assert more, heard
        heard += more
    return heard
