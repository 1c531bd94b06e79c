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
from typing import Any

import grpc.aio
import pytest
from rich.console import Console

from expertd.cli import main
from expertd.client.tools.top import Seen, chosen, look, render
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
        servers[1].engine.close("the server is draining; use another replica")
        text = shown(await look(addresses))
        code = await asyncio.to_thread(main, ["top", *addresses[:2], "--once"])
        servers[1].engine.open()
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


async def test_q_ends_it_and_leaves_the_terminal_as_it_was() -> None:
    controller, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "expertd.cli", "top", GONE, "--interval", "30"),
        stdin=terminal,
        stdout=terminal,
        start_new_session=True,
        preexec_fn=_control,
    )
    screen = b""
    while b"servers ready" not in screen:
        screen += await asyncio.to_thread(os.read, controller, 65536)
    os.write(controller, b"q")
    assert await asyncio.wait_for(process.wait(), 20) == 0
    assert termios.tcgetattr(terminal) == before
    os.close(terminal)
    os.close(controller)


def status(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    told: dict[str, Any] = {
        "model_fingerprint": "0123456789abcdef",
        "routed_experts": 64,
        "ready": True,
        "reason": None,
        "uptime": 90000.0,
        "tokens_per_second": 123456.0,
        "requests_per_second": 1234.0,
        "queue": {"tokens": 3, "capacity": 100},
        "stages": {"total": {"p50": 0.0123, "p99": 0.123}},
        "outcomes": {"ok": 7, "unavailable": 2},
        "errors": [],
        "loads": {"layers": [3], "experts": list(range(0, 64, 2)), "pairs": [[7] * 32], "balance": {"1": 0.98}},
    }
    return told | changes


def test_80_columns_cut_neither_addresses_nor_figures() -> None:
    address = "expertd-17.expertd.inference.svc:9464"
    output = io.StringIO()
    Console(file=output, width=80).print(render([Seen(address, status())], 0.0, 80))
    text = output.getvalue()
    assert all(figure in text for figure in ("123k", "12.3ms", "123ms", "3%"))
    assert "…" not in text
    start = next(line for line in text.splitlines() if "ready" in line and "12.3ms" in line)
    width = start.index("ready")
    assert "".join(line[:width].strip() for line in text.splitlines()[4:]).startswith(address)


@pytest.mark.parametrize("width", [80, 110, 120])
def test_an_ipv4_address_stays_on_one_line(width: int) -> None:
    seen = [Seen("10.123.210.117:50051", status()), Seen("255.255.255.255:65535", None, "gone")]
    output = io.StringIO()
    Console(file=output, width=width).print(render(seen, 0.0, width))
    lines = output.getvalue().splitlines()
    assert all(any(line.strip().startswith(f"{one.address} ") for line in lines[:-1]) for one in seen)
    assert all(figure in output.getvalue() for figure in ("123k", "12.3ms", "123ms", "3%"))


def test_a_lost_device_is_told() -> None:
    devices = [{"number": 0, "lost": None}, {"number": 1, "lost": "it has not answered for 30 s"}]
    assert "a:1: device 1 of 2 is lost: it has not answered for 30 s" in shown([Seen("a:1", status(devices=devices))])


def test_servers_are_sorted_and_filtered() -> None:
    seen = [
        Seen("a:1", None, "gone"),
        Seen("b:1", status(tokens_per_second=1.0)),
        Seen("c:1", status(ready=False, uptime=1.0)),
    ]
    assert [one.address for one in chosen(seen, None, "")] == ["a:1", "b:1", "c:1"]
    assert [one.address for one in chosen(seen, "tokens", "")] == ["c:1", "b:1", "a:1"]
    assert [one.address for one in chosen(seen, "up", "1")] == ["c:1", "b:1", "a:1"]
    assert [one.address for one in chosen(seen, None, "not ready")] == ["c:1"]
    assert [one.address for one in chosen(seen, None, "no answer")] == ["a:1"]


def _control() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_mixed_or_partly_lost_fleet_is_told_as_such() -> None:
    even, odd = (status()["loads"] | {"experts": list(range(first, 64, 2))} for first in (0, 1))
    whole = [Seen("a:1", status(loads=even)), Seen("b:1", status(loads=odd))]
    assert "fleet:" not in shown(whole)
    lost = shown([whole[0], Seen("b:1", None, "gone")])
    assert "fleet: layers 3: nobody owns experts 1, 3, 5, 7, 9, 11, 13, 15 and 24 more (--experts " in lost
    other = Seen("c:1", status(loads=odd, model_fingerprint="fedcba9876543210"))
    mixed = [line.strip() for line in shown([whole[0], other, whole[1]]).splitlines()]
    rows = [line.split()[0] for line in mixed if line.startswith(("a:1 ", "b:1 ", "c:1 "))]
    assert rows == ["a:1", "b:1", "c:1"]
    assert mixed.index("model 0123456789ab") < mixed.index("model fedcba987654")
    assert "fleet: mixed models: '0123456789abcdef' on a:1, b:1; 'fedcba9876543210' on c:1" in mixed
    assert "fleet: of '0123456789abcdef': whole" in mixed
    assert any(line.startswith("fleet: of 'fedcba9876543210': layers 3: nobody owns experts 0, 2") for line in mixed)


async def test_scripts_see_a_partly_lost_fleet_by_the_exit_code(small_model: Path) -> None:
    async with running_servers(small_model, HALVES) as servers:
        addresses = [str(server.metrics_address) for server in servers]
        assert await asyncio.to_thread(main, ["top", "--once", *addresses]) == 0
        assert await asyncio.to_thread(main, ["top", "--once", addresses[0]]) == 1
        assert await asyncio.to_thread(main, ["top", "--once", "--filter", addresses[0], *addresses]) == 0
