"""`expertd rebalance --watch`, and several who rebalance at once."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from expertd.cli import main
from expertd.client.placement.rebalance import rebalance
from expertd.client.placement.watching import locked, repeat
from expertd.proto.base.errors import Unavailable
from expertd.server.app import Server
from tests.client.placement.said import Said, rebalance_arguments
from tests.support.fleets import addresses, running_servers
from tests.support.serving import ANY_PORT

SHARDS = (range(6), range(6, 12), range(12, 16))
HOT = {"1": [90, 80, *[1] * 14], "2": [*[1] * 14, 80, 90]}
OTHER = {"1": [*[1] * 14, 80, 90], "2": [90, 80, *[1] * 14]}


@pytest.fixture
async def servers(small_model: Path) -> AsyncIterator[list[Server]]:
    async with running_servers(small_model, SHARDS, admin_listen=ANY_PORT) as started:
        yield started


def is_whole(servers: list[Server]) -> bool:
    return all(
        set().union(*(one.shard.experts.get(layer, ()) for one in servers)) == set(range(16)) for layer in (1, 2)
    )


async def test_rounds_are_limited_and_go_on_as_loads_change(
    servers: list[Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loads, said = tmp_path / "loads.json", Said(capsys)
    loads.write_text(json.dumps(HOT))
    options = ("--slots", "7", "--loads", str(loads), "--apply", "--pause", "0", "--watch", "0.1", "--most-moves", "3")
    watching = asyncio.create_task(rebalance(rebalance_arguments(*addresses(servers), *options)))
    try:
        for _ in range(2):
            assert 0 < int((await said.wait_for(r"(\d+) experts to read"))[1]) <= 3
            await said.wait_for(r"(\d+) of \1 updates done")
        await said.wait_for(r"not to be done")
        quiet = [server.info.placement_epoch for server in servers]
        await said.wait_for(r"not to be done")
        assert [server.info.placement_epoch for server in servers] == quiet
        loads.write_text("{")
        await said.wait_for(r"not this time: .*loads.json is not valid JSON")
        loads.write_text(json.dumps(OTHER))
        await said.wait_for(r"(\d+) of \1 updates done")
        assert is_whole(servers)
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def test_two_at_once_move_one_at_a_time(servers: list[Server], tmp_path: Path) -> None:
    """Each wants what the other one takes away."""
    lock, loads = tmp_path / "lock", [tmp_path / "one.json", tmp_path / "other.json"]
    watching = []
    for file, content in zip(loads, (HOT, OTHER), strict=True):
        file.write_text(json.dumps(content))
        options = (
            "--slots",
            "7",
            "--loads",
            str(file),
            "--apply",
            "--pause",
            "0",
            "--watch",
            "0.05",
            "--lock",
            str(lock),
        )
        watching.append(asyncio.create_task(rebalance(rebalance_arguments(*addresses(servers), *options))))
    epochs: set[tuple[int, ...]] = set()
    async with asyncio.timeout(60):
        while len(epochs) < 10:
            await asyncio.sleep(0.01)
            epochs.add(tuple(server.info.placement_epoch for server in servers))
            assert is_whole(servers)
            assert all(len(experts) <= 7 for one in servers for experts in one.shard.experts.values())
    for one in watching:
        one.cancel()
    assert all(
        isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*watching, return_exceptions=True)
    )


async def test_a_lock_is_held_by_one_process_and_ends_with_it(
    servers: list[Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock, loads = tmp_path / "lock", tmp_path / "loads.json"
    loads.write_text(json.dumps(HOT))
    command = ["rebalance", *addresses(servers), "--slots", "7", "--loads", str(loads), "--lock", str(lock)]
    code = (
        f"import fcntl; file = open({str(lock)!r}, 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert await asyncio.to_thread(main, [*command, "--apply"]) == 1
        assert f"another rebalance holds {lock}; wait for its end" in capsys.readouterr().err
        # To look needs no lock.
        assert await asyncio.to_thread(main, command) == 0
        holder.kill()
    with locked(lock), pytest.raises(Unavailable, match="another rebalance holds"), locked(lock):
        pass
    assert await asyncio.to_thread(main, [*command, "--apply"]) == 0
    assert re.search(r"(\d+) of \1 updates done", capsys.readouterr().out)


async def test_what_goes_wrong_is_told_and_tried_again() -> None:
    faults: list[Exception] = [OSError("one"), Unavailable("two"), ValueError("three")]
    told: list[Exception] = []

    async def work() -> None:
        if faults:
            raise faults.pop(0)
        raise AssertionError("an error of the program ends it")

    with pytest.raises(AssertionError):
        await repeat(0.001, work, told.append)
    assert [str(error) for error in told] == ["one", "two", "three"]


def test_what_can_never_work_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rebalance", "--watch", "1"]) == 2
    assert main(["rebalance", "nonsense", "--watch", "1"]) == 2
    assert "ADDRESS" in capsys.readouterr().err
