"""A server whose standard error is a full pipe that nobody reads serves and ends like any other."""

import asyncio
import contextlib
import fcntl
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expertd import GRPC_VERBOSITY
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.transport.security import ClientSecurity
from tests.support.certificates import Authority
from tests.support.process import Serving, serving

PIPE_BYTES = 4096
CALLS = 300


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe that is full."""
    ours, theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.write(theirs, b"x" * PIPE_BYTES)
    os.set_blocking(ours, False)
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def take(pipe: int) -> str:
    """What is in it."""
    with contextlib.suppress(BlockingIOError):
        return str(os.read(pipe, 1 << 20), "utf-8")
    return ""


def dropped_lines(server: Serving) -> int:
    with urllib.request.urlopen(f"{server.site}/metrics", timeout=10) as answer:
        found = re.search(r"^expertd_log_lines_dropped_total (\S+)$", str(answer.read(), "utf-8"), re.MULTILINE)
    assert found
    return int(float(found[1]))


def end(server: Serving) -> None:
    server.process.terminate()
    assert server.process.wait(20) == 0


async def call(moe: Coordinator, count: int) -> None:
    ids, weights = torch.arange(4).expand(1, 4), torch.ones(1, 4)
    for _ in range(count):
        await asyncio.wait_for(moe(1, torch.randn(1, 256), topk_ids=ids, topk_weights=weights), 20)


async def test_it_answers_calls_and_ends_on_sigterm(small_model: Path, tmp_path: Path, pipe: tuple[int, int]) -> None:
    with serving(small_model, tmp_path, "--log-level", "debug", stderr=pipe[1]) as server:
        async with Coordinator([server.listen]) as moe:
            await call(moe, CALLS)
        assert take(pipe[0]) == "x" * PIPE_BYTES
        end(server)


async def test_lines_that_find_no_room_are_counted_and_said_when_somebody_reads(
    small_model: Path, tmp_path: Path, pipe: tuple[int, int]
) -> None:
    few = {"telemetry.log_writer.MOST_LINES": CALLS // 2}
    with serving(small_model, tmp_path, "--log-level", "debug", stderr=pipe[1], constants=few) as server:
        async with Coordinator([server.listen]) as moe:
            await call(moe, CALLS)
        async with asyncio.timeout(10):
            while not (dropped := dropped_lines(server)):
                await asyncio.sleep(0.05)
        text = ""
        async with asyncio.timeout(10):
            while " lines were dropped" not in text:
                text += take(pipe[0])
                await asyncio.sleep(0.01)
        said = re.search(r"WARNING \S+log_writer: (\d+) lines were dropped: standard error was not read\n", text)
        assert said
        assert int(said[1]) >= dropped
        assert "serving on" in text
        server.process.terminate()
        while server.process.poll() is None:
            text += take(pipe[0])
            await asyncio.sleep(0.01)
        assert server.process.returncode == 0
        # What waited at its end is written too, as long as somebody reads.
        assert (text + take(pipe[0])).endswith("expertd.server.app: stopped\n")


async def test_what_grpc_says_of_failed_handshakes_does_not_block_it(
    small_model: Path, tmp_path: Path, pipe: tuple[int, int]
) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    options = ("--tls-cert", str(certificate), "--tls-key", str(key))
    trusting = CoordinatorConfig(security=ClientSecurity(root_ca=authority.pem))
    # As if this process had not silenced gRPC.
    with serving(small_model, tmp_path, *options, stderr=pipe[1], environment={GRPC_VERBOSITY: ""}) as server:
        host, _, port = server.listen.rpartition(":")
        for _ in range(20):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"no TLS at all, and a line of gRPC's about it")
            await writer.drain()
            writer.close()
        async with Coordinator([server.listen], trusting) as moe:
            await call(moe, 1)
        end(server)
