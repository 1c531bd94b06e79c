"""`expertd demo` as a newcomer runs it, and that it can fail."""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from expertd.client.tools import demo
from expertd.client.tools.cluster import LocalCluster
from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.proto.base.errors import UnknownExpert
from tests.support.families import SMALL, write_family

SMALL_DEMO = ["--servers", "4"]


def arguments(*extra: str, **others: object) -> argparse.Namespace:
    """What the command line says; `others` are what it has no words for."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(extra, argparse.Namespace(**others))


def run(*extra: str, **others: object) -> int:
    return demo.run(arguments(*extra, **others))


def children(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # Others of the machine end meanwhile.
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(stat.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_whole_demo_ends_green(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(batches={1: 3, 64: 3, 1024: 2}) == 0
    shown = capfd.readouterr().out
    assert "starting 8 servers with experts 0-31, 32-63, " in shown
    assert shown.count(": ok") == 6
    assert "http://127.0.0.1:" in shown
    assert "all 8 servers drained and exited 0" in shown
    written = tmp_path / "expertd" / "demo" / DemoModel().name
    before = (written / "config.json").stat().st_mtime_ns
    assert write_demo_checkpoint(tmp_path / "expertd" / "demo", DemoModel()) == written
    assert (written / "config.json").stat().st_mtime_ns == before, "it is reused"


@pytest.mark.parametrize("bound", ["layer", "routed", "exact"])
def test_a_result_outside_its_bound_fails_the_demo(
    small_model: Path, bound: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    narrow: dict[str, Any] = {bound: 1e-12, "beyond": -1.0}
    monkeypatch.setitem(demo.BOUNDS, "torch", replace(demo.BOUNDS["torch"], **narrow))
    assert run("--model", str(small_model), *SMALL_DEMO, batches={64: 1, 8: 1}) == 1
    shown = capfd.readouterr().out
    assert shown.count(": MISMATCH") == 4
    assert "FAILED: results outside their bounds" in shown


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_next"])
def test_other_families_are_compared_with_their_own_block(
    model_type: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # One token of the first layer of Qwen3-Next is 4.7e-2 off: so is transformers' block, given that token in FP8.
    folder = write_family(tmp_path, model_type).quantized
    assert run("--model", str(folder), "--servers", "2", batches={1: 1, 1024: 1}) == 0
    assert capfd.readouterr().out.count(": ok") == 4


async def test_servers_that_run_already_are_compared_and_left_running(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # At 256 wide the shared expert, which is exact, is a smaller part of the output than at the demo's 512.
    monkeypatch.setitem(demo.BOUNDS, "torch", replace(demo.BOUNDS["torch"], layer=4e-2))
    async with LocalCluster(small_model, ["0-7", "8-15"], ["--threads", "1"]) as cluster:
        connect = ("--model", str(small_model), "--connect", *cluster.addresses)
        assert await demo.demonstrate(arguments(*connect, batches={64: 2}), Console()) == 0
        assert "every result agrees, with 2 servers" in capfd.readouterr().out
        with pytest.raises(UnknownExpert, match="no server owns experts 8, 9"):
            await demo.demonstrate(arguments(*connect[:-1]), Console())
        assert all(server.process.returncode is None for server in cluster.servers)


def test_connecting_needs_the_checkpoint_of_the_servers(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--connect", "127.0.0.1:1") == 2
    assert "--connect needs --model" in capfd.readouterr().err


def test_the_checkpoint_alone_can_be_written(tmp_path: Path) -> None:
    assert run("--write", str(tmp_path / "new" / "demo"), demo_model=SMALL) == 0
    assert run("--write", str(tmp_path / "new" / "demo"), demo_model=SMALL) == 0, "it is kept"
    with Checkpoint(tmp_path / "new" / "demo") as checkpoint:
        assert checkpoint.config.n_routed_experts == SMALL.n_routed_experts


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--model", str(tmp_path)) == 2
    assert f"expertd demo: error: {tmp_path}/config.json does not exist" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupt_stops_every_server(small_model: Path, number: signal.Signals) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "expertd.cli", "demo", "--model", str(small_model), *SMALL_DEMO),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    while b"all healthy" not in (line := await process.stdout.readline()):
        assert line, "the demo ended too soon"
    servers = children(process.pid)
    assert len(servers) == 4
    process.send_signal(number)
    rest = await process.stdout.read()
    assert await process.wait() == 130
    assert b"interrupted; all servers are stopped" in rest
    assert not any(map(is_running, servers))
