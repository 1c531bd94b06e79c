"""`expertd top`: what it shows of servers that answer, start, or are gone."""

import asyncio
import fcntl
import io
import os
import pty
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import grpc.aio
import pytest
from rich.console import Console

from expertd.cli import main
from expertd.client.tools.top import Seen, look, render
from tests.support.fleets import running_servers
from tests.support.serving import execute_method, open_channel, random_batch, request_for

HALVES = (range(8), range(8, 16))
GONE = "127.0.0.1:1"


async def test_every_server_is_a_row(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running_servers(small_model, HALVES) as servers:
        async with open_channel(servers[0]) as channel:
            execute = execute_method(channel)
            for _ in range(4):
                await execute(request_for(servers[0], random_batch(1500, 256, 8, 4)))
            with pytest.raises(grpc.aio.AioRpcError):
                await execute(request_for(servers[0], random_batch(1, 256, 8, 4), layer=50))
        addresses = [*(str(server.metrics_address) for server in servers), GONE]
        servers[1].scheduler.close("the server is draining; use another replica")
        text = shown(await look(addresses))
        code = await asyncio.to_thread(main, ["top", *addresses[:2], "--once"])
        servers[1].scheduler.open()
        assert code == 1
        assert await asyncio.to_thread(main, ["top", *addresses[:2]]) == 0
    assert "2 of 2 servers ready" in capsys.readouterr().out
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0].startswith("1 of 3 servers ready")
    first, second, third = (next(line for line in lines if line.startswith(address)).split() for address in addresses)
    assert first[1:3] == ["ready", "0-7"]
    assert first[3].endswith("k")
    assert [cell[-2:] for cell in first[6:8]] == ["ms", "ms"]
    assert (first[-4], first[-2]) == ("0%", "1")
    assert second[1:4] == ["not", "ready", "8-15"]
    assert third[1:] == ["no", "answer"]
    assert f"{addresses[1]} the server is draining; use another replica" in lines
    assert f"{GONE} Connection refused" in lines
    assert lines[-1].endswith(f"{addresses[0]} not_found layer is 50; this server owns layers 1-2")


def shown(seen: Sequence[Seen]) -> str:
    output = io.StringIO()
    Console(file=output, width=200).print(render(seen, 0.0))
    return output.getvalue()


def test_nobody_there_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", GONE, "--once"]) == 1
    assert "0 of 1 servers ready" in capsys.readouterr().out


async def test_a_terminal_is_refreshed_until_ctrl_c(small_model: Path) -> None:
    async with running_servers(small_model, HALVES) as servers:
        addresses = [str(server.metrics_address) for server in servers]
        command = [sys.executable, "-P", "-m", "expertd.cli", "top", *addresses, "--interval", "0.1"]
        controller, terminal = pty.openpty()
        # The controlling terminal of a session of its own, so that the byte of Ctrl-C reaches it as a signal.
        process = await asyncio.create_subprocess_exec(
            *command, stdin=terminal, stdout=terminal, start_new_session=True, preexec_fn=_control
        )
        os.close(terminal)
        screen = b""
        while screen.count(b"servers ready") < 3:
            screen += await asyncio.to_thread(os.read, controller, 65536)
        os.write(controller, b"\x03")
        assert await asyncio.wait_for(process.wait(), 30) == 0
        os.close(controller)
    assert b"2 of 2 servers ready" in screen


def _control() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
