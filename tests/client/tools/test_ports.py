"""Commands that talk to servers: either port, TLS and tokens by the same options, and one line for what is wrong."""

import asyncio
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expertd.cli import main
from expertd.client.fleet.ports import explained
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.client.transport.security import ClientSecurity
from expertd.server.app import Server
from tests.support.certificates import Authority
from tests.support.families import SMALL
from tests.support.fleets import running_servers
from tests.support.serving import running_server

TOKEN = "swordfish"
PROGRAM = (sys.executable, "-m", "expertd.cli")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("other"), replace(SMALL, seed=SMALL.seed + 1))


@pytest.fixture
async def secured(small_model: Path, tmp_path: Path) -> AsyncIterator[tuple[Server, list[str]]]:
    """A server with TLS and tokens, and the options for it."""
    authority, tokens = Authority(tmp_path), tmp_path / "tokens"
    cert, key = authority.issue("server")
    tokens.write_text(f"{TOKEN}\n")
    options: dict[str, Any] = {"tls_cert": cert, "tls_key": key, "auth_token_file": tokens, "per_expert_metrics": True}
    async with running_server(small_model, range(16), **options) as server:
        yield server, ["--tls-ca", str(authority.pem), "--auth-token-file", str(tokens)]


async def called(*arguments: str) -> int:
    try:
        return await asyncio.to_thread(main, list(arguments))
    except SystemExit as ended:
        return int(str(ended.code))


@pytest.mark.parametrize("port", ["address", "metrics_address"])
async def test_every_command_takes_either_port_tls_and_tokens(
    secured: tuple[Server, list[str]], port: str, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, options = secured
    address = str(getattr(server, port))
    quick = ["--tokens", "1", "--callers", "1", "--seconds", "0.05", "--transport", "grpc"]
    plan = ["plan", "--loads", address, "--servers", "2", *options]
    assert await called(*plan) == 2
    assert "no traffic at all" in capsys.readouterr().err
    for command in (
        ["health", address],
        ["status", address],
        ["top", "--once", address],
        ["verify", address, "--layers", "1", "--experts", "3"],
    ):
        assert await called(*command, *options) == 0, command
    # Signal handlers are the main thread's.
    bench = await asyncio.create_subprocess_exec(
        *PROGRAM, "bench", "serve", "--servers", address, *quick, *options, stdout=asyncio.subprocess.DEVNULL
    )
    assert await bench.wait() == 0
    assert str(server.metrics_address) in capsys.readouterr().out
    assert await called(*plan) == 0


async def test_what_is_missing_is_named_by_its_option(
    secured: tuple[Server, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    server, (_, ca, _, _) = secured
    address = str(server.address)
    for command in (["verify", address], ["top", "--once", address], ["plan", "--servers", "2", "--loads", address]):
        assert await called(*command, "--tls-ca", ca) == 2
        said = capsys.readouterr().err
        assert said.endswith(": give --auth-token-file\n")
        assert len(said.splitlines()) == 1
    assert await called("health", address) == 1
    assert capsys.readouterr().out.endswith("Socket closed: a server with TLS needs --tls-ca\n")


async def test_plans_are_refused_to_a_part_of_a_fleet_and_to_a_mixed_one(
    small_model: Path, other_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["plan", "--servers", "2", "--loads"]
    async with (
        running_servers(small_model, [range(8), range(8, 16)]) as (low, high),
        running_server(other_model, range(16), per_expert_metrics=True) as other,
    ):
        assert await called(*plan, str(low.address)) == 2
        assert "no whole fleet of one model: layers 1-2: nobody owns experts 8, 9" in capsys.readouterr().err
        assert await called(*plan, str(low.address), str(other.metrics_address)) == 2
        assert "no whole fleet of one model: mixed models: " in capsys.readouterr().err
        assert await called(*plan, str(low.address), str(high.address), "127.0.0.1:1") == 2
        assert "127.0.0.1:1 does not serve" in capsys.readouterr().err


async def test_plans_are_refused_to_the_pages_of_several_models(
    small_model: Path, other_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        running_server(small_model, range(16), per_expert_metrics=True) as one,
        running_server(other_model, range(16), per_expert_metrics=True) as other,
    ):
        pages = [f"http://{server.metrics_address}" for server in (one, other)]
        assert await called("plan", "--servers", "2", "--loads", *pages) == 2
        assert "--loads mixes models: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["top", "--interval", "0", "127.0.0.1:1"],
        ["status", "--timeout", "0", "127.0.0.1:1"],
        ["health", "--timeout", "-1", "127.0.0.1:1"],
        ["verify", "--layers", "x", "127.0.0.1:1"],
        ["doctor", "--peers", "localhost"],
        ["plan", "--servers", "2", "--loads", "nothing.json"],
        ["plan", "--loads", "http://127.0.0.1:1/metrics", "--servers", "2"],
        ["plan", "--loads", os.devnull, "--fleet", "nothing.json"],
        ["bench", "serve", "--servers", "localhost"],
        ["demo", "--connect", "localhost", "--model", "MODEL"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_2_with_one_line_of_ours(
    command: list[str], small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([str(small_model) if word == "MODEL" else word for word in command])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_what_grpc_says_is_explained() -> None:
    assert explained("a: Trying to connect an http1.x server", ClientSecurity()) == (
        "a: that is no gRPC port; give the address of its --listen"
    )
    assert explained("anything else", ClientSecurity()) == "anything else"


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["status", "127.0.0.1:1"], "asking servers"),
        (["plan", "--simulate", "--slots", "256"], "simulating"),
        (["verify", "127.0.0.1:1", "--model", "MODEL"], "looking at the checkpoint"),
    ],
)
def test_long_work_is_shown_on_a_terminal_alone(command: list[str], shown: str, small_model: Path) -> None:
    program = [*PROGRAM, *(str(small_model) if word == "MODEL" else word for word in command)]
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    seen = b""
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as running:
        os.close(theirs)
        while shown.encode() not in seen:
            try:
                seen += os.read(ours, 4096)
            except OSError:
                break
        running.kill()
    os.close(ours)
    assert shown.encode() in seen
    piped = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False)
    assert shown not in piped.stderr + piped.stdout
