"""Tokens, certificates and authorities that fail to be read, in every order, and are right in the end."""

import asyncio
import itertools
import logging
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from expertd.client.transport.security import ClientSecurity
from expertd.proto import codec
from expertd.server.app import Server
from expertd.server.rpc import security
from tests.support.certificates import Authority
from tests.support.serving import running_server

FAILURES = ("missing", "unreadable", "unusable")
ORDERS = [order for length in (1, 2, 3) for order in itertools.permutations(FAILURES, length)]


class Disk:
    """Files that can be exchanged, and reads of them that can fail although nothing of the file says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: Path | None = None
        read_bytes = Path.read_bytes

        def read(path: Path) -> bytes:
            if path == self.failing:
                raise OSError(5, "Input/output error")
            return read_bytes(path)

        monkeypatch.setattr(Path, "read_bytes", read)

    def replace(self, path: Path, content: bytes) -> None:
        new = path.with_suffix(".new")
        new.write_bytes(content)
        new.replace(path)

    def fail(self, how: str, path: Path, content: bytes) -> None:
        """`content` is what would be right."""
        self.failing = None
        if how == "missing":
            path.unlink()
        elif how == "unreadable":
            self.failing = path
            self.replace(path, content)
        else:
            self.replace(path, b"\n")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(security, "RETRY_SECONDS", 0.05)
    return Disk(monkeypatch)


async def let_in(server: Server, caller: ClientSecurity) -> bool:
    """Whether a new connection is, at its first attempt."""
    async with caller.open_channel(str(server.address), [("grpc.use_local_subchannel_pool", 1)]) as channel:
        get_shard: Any = channel.unary_unary(f"/{codec.SERVICE}/GetShard", codec.ShardRequest.SerializeToString)
        try:
            await get_shard(codec.ShardRequest(), metadata=caller.metadata(), timeout=10)
        except grpc.aio.AioRpcError:
            return False
        return True


def failures(server: Server) -> float:
    return server.metrics.registry.get_sample_value("expertd_security_file_errors_total") or 0.0


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.02)


async def check(
    server: Server, disk: Disk, path: Path, content: bytes, order: tuple[str, ...], callers: list[ClientSecurity]
) -> None:
    """After every failure the former caller is let in and the new one not; in the end it is the other way round."""
    former, new = callers
    for how in order:
        before = failures(server)
        disk.fail(how, path, content)
        assert await let_in(server, former)
        assert not await let_in(server, new)
        assert failures(server) > before
    disk.failing = None
    # What could not be read stays as it is: only the next read is another one.
    if order[-1] != "unreadable":
        disk.replace(path, content)
    await until(lambda: let_in(server, new))
    assert not await let_in(server, former)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
async def test_tokens(small_model: Path, tmp_path: Path, disk: Disk, order: tuple[str, ...]) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("former")
    callers = [ClientSecurity(token="former"), ClientSecurity(token="new")]
    async with running_server(small_model, range(16), auth_token_file=tokens) as server:
        await check(server, disk, tokens, b"new", order, callers)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
async def test_client_authorities(small_model: Path, tmp_path: Path, disk: Disk, order: tuple[str, ...]) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    certificate, key = authority.issue("server")
    trusted = Path(shutil.copy(authority.pem, tmp_path / "trusted.pem"))
    issued = [one.issue(f"caller-{number}") for number, one in enumerate((authority, stranger))]
    callers = [ClientSecurity(root_ca=authority.pem, client_cert=own, client_key=own_key) for own, own_key in issued]
    options = {"tls_cert": certificate, "tls_key": key, "tls_client_ca": trusted}
    async with running_server(small_model, range(16), **options) as server:
        await check(server, disk, trusted, stranger.pem.read_bytes(), order, callers)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
async def test_certificates(small_model: Path, tmp_path: Path, disk: Disk, order: tuple[str, ...]) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    certificate, key = authority.issue("server")
    renewed, renewed_key = stranger.issue("renewed")
    callers = [ClientSecurity(root_ca=one.pem) for one in (authority, stranger)]
    async with running_server(small_model, range(16), tls_cert=certificate, tls_key=key) as server:
        # The key comes first and fits nothing: what follows fails in whatever way it fails.
        disk.replace(key, renewed_key.read_bytes())
        await check(server, disk, certificate, renewed.read_bytes(), order, callers)


async def test_a_failure_is_logged_once_and_again_when_it_is_another(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("former")
    counted: list[None] = []
    files = security.WatchedFiles((tokens,), lambda: security._read_tokens(tokens), lambda: counted.append(None))
    for how, complaint in (("unreadable", "Input/output error"), ("unusable", "is empty"), ("missing", "No such file")):
        caplog.clear()
        disk.fail(how, tokens, b"new")
        for _ in range(3):
            assert not files.refresh()
            os.utime(tokens) if tokens.exists() else None
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert complaint in record.getMessage()
    assert len(counted) >= 3
    disk.replace(tokens, b"new")
    assert files.refresh()
    assert files.value == (b"new",)
