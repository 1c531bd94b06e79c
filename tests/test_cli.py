"""The command as a whole: what it says without arguments, when its reader leaves, and of errors nobody caught."""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from expertd import cli
from expertd.proto.base.errors import Unauthenticated
from tests.support.serving import running_server

COMMAND = (sys.executable, "-P", "-m", "expertd.cli")


def test_alone_it_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in cli.COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["abacus"],
        ["serve"],
        ["top"],
        ["plan"],
        ["status", "x"],
        ["top", "x"],
        ["verify", "x"],
        ["health", "x"],
        ["up", "--model", "/x"],
    ],
)
def test_usage_errors_exit_2_without_a_traceback(arguments: list[str]) -> None:
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


async def test_a_reader_who_leaves_ends_it_quietly(small_model: Path) -> None:
    async with running_server(small_model, range(16)) as server:
        command = [*COMMAND, "status", "--json", str(server.address)]
        reading, writing = os.pipe()
        os.close(reading)
        ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_an_error_that_a_command_has_no_word_for_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: argparse.Namespace) -> int:
        raise Unauthenticated("authorization is missing")

    monkeypatch.setattr("expertd.client.tools.top.run", refuse)
    assert cli.main(["top", "node0:9464"]) == 1
    assert capsys.readouterr().err == "expertd top: error: authorization is missing\n"


def test_a_port_in_use_is_one_line(small_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ["--model", str(small_model), "--experts", "all", "--listen", address, "--log-level", "error"]
        ended = subprocess.run([*COMMAND, "serve", *options], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr == f"expertd serve: error: --listen {address} cannot be bound: Address already in use\n"


def test_shells_complete_commands_and_their_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    asked = f"source {script}; COMP_WORDS=(expertd status --tls-c); COMP_CWORD=2; _shtab_expertd"
    shell = ["bash", "-c", asked + "; echo ${COMPREPLY[@]}"]
    ended = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=True)
    assert set(ended.stdout.split()) >= {"--tls-ca", "--tls-client-cert", "--tls-client-key"}
