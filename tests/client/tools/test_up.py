"""`expertd up`: a whole model with one command, its snippet works, Ctrl-C drains, what fails is told."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.client.tools.up import gpus_of, snippet
from tests.support.process import said_until

TORCH = ("--", "--backend", "torch", "--threads", "1")


@contextlib.contextmanager
def up(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-m", "expertd.cli", "up", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.parametrize(
    ("servers", "gpus", "own"),
    [
        (1, 0, [[]]),
        (1, 8, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (2, 4, [[0, 1], [2, 3]]),
        (3, 8, [[0, 1], [2, 3], [4, 5]]),
        (3, 2, [[0], [1], [0]]),
    ],
)
def test_servers_share_the_gpus(servers: int, gpus: int, own: list[list[int]]) -> None:
    assert [list(gpus_of(index, servers, gpus)) for index in range(servers)] == own


def test_a_model_is_served_until_ctrl_c_and_the_snippet_calls_it(small_model: Path) -> None:
    with up("--model", str(small_model), "--servers", "3", "--port", "0", *TORCH) as process:
        said = said_until(process, "topk_weights=weights)")
        addresses = re.findall(r"^  (127\.0\.0\.1:\d+)  metrics http", said, re.MULTILINE)
        assert len(addresses) == 3
        assert snippet(addresses) in said
        assert re.search(r"^server 2: \w+", said, re.MULTILINE)
        calling = (
            "import torch\nlayer, hidden = 1, torch.randn(2, 256)\n"
            "ids, weights = torch.arange(4).repeat(2, 1), torch.rand(2, 4)\n"
        )
        subprocess.run([sys.executable, "-P", "-c", calling + snippet(addresses)], check=True, timeout=60)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=40)
        assert "all servers drained and stopped" in rest
    assert process.returncode == 0


def test_in_the_background_of_a_script_sigterm_stops_it(small_model: Path) -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with up("--model", str(small_model), "--port", "0", *TORCH) as process:
            signal.signal(signal.SIGINT, former)
            said_until(process, "until Ctrl-C")
            process.terminate()
            rest, _ = process.communicate(timeout=40)
    finally:
        signal.signal(signal.SIGINT, former)
    assert "all servers drained and stopped" in rest
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "/nowhere"), "/nowhere/config.json does not exist"),
        (("--servers", "17"), "--servers is 17; it must be from 1 to the model's 16 experts"),
        (("--port", "65536"), "--port is 65536; it must be from 0 to 65535"),
    ],
)
def test_what_cannot_be_served_is_a_usage_error(small_model: Path, arguments: tuple[str, ...], said: str) -> None:
    with up("--model", str(small_model), *arguments) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said in error


def test_a_server_that_cannot_start_ends_the_command_with_its_reason(small_model: Path) -> None:
    started = time.monotonic()
    with up("--model", str(small_model), "--port", "0", "--", "--backend", "abacus") as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--backend is 'abacus'; choose from" in error
    assert time.monotonic() - started < 60
