"""A server that is emptied before it is drained, and one that is gone already."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.cli import main
from expertd.client.coordinator import Coordinator
from expertd.client.fleet.survey import judge, survey
from expertd.client.placement.rebalance import rebalance
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.oracle.reference import relative_error
from expertd.server.app import Server
from tests.client.placement.said import rebalance_arguments
from tests.docs.fences import ROOT, Fence
from tests.support.coordinators import LAYER, QUICK, expected, routing, tokens
from tests.support.fleets import addresses, running_servers, stop
from tests.support.serving import ANY_PORT

RUN_HERE = "run by tests/client/placement/test_leave.py"
OPTIONS = {"admin_listen": ANY_PORT, "per_expert_metrics": True}
PATIENT = replace(QUICK, owner_timeout=20.0, max_attempts=20)
"""A machine under test is busy."""
SHARDS = (range(6), range(6, 12), range(12, 16))


@pytest.fixture
async def servers(small_model: Path) -> AsyncIterator[list[Server]]:
    async with running_servers(small_model, SHARDS, **OPTIONS) as started:
        yield started


async def run(*words: str) -> None:
    await rebalance(rebalance_arguments(*words))


async def test_a_server_leaves_under_calls(
    small_model: Path, servers: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    ids, weights = routing(20)
    right = expected(small_model)
    low, middle, high = servers
    async with Coordinator(addresses(servers), PATIENT) as moe:

        async def call() -> None:
            assert relative_error(await moe(LAYER, tokens(20), topk_ids=ids, topk_weights=weights), right) < 1e-5

        command = ("--slots", "9", "--over", "0.1", "--pause", "0", "--apply", "--leave", str(middle.metrics_address))
        leaving = asyncio.create_task(run(*addresses(servers), *command))
        while not leaving.done():
            await call()
            await asyncio.sleep(0.001)
        await leaving
        assert middle.shard.experts == {}
        assert f"{middle.address} owns nothing, nor is it to: it can be drained" in capsys.readouterr().out
        await call()
        assert judge(await survey(addresses(servers), ClientSecurity(), 5.0)).problems == ()
        await stop(middle)
        await call()
    held = [{layer: set(experts) for layer, experts in one.shard.experts.items()} for one in (low, high)]
    assert all(held[0][layer] | held[1][layer] == set(range(16)) for layer in (1, 2))
    assert all(len(experts) <= 9 for one in held for experts in one.values())


async def test_an_empty_server_takes_its_part_again(servers: list[Server], tmp_path: Path) -> None:
    loads = tmp_path / "loads.json"
    loads.write_text(json.dumps({"1": [3, *[1] * 15], "2": [1] * 16}))
    command = (*addresses(servers), "--slots", "9", "--loads", str(loads), "--pause", "0", "--apply")
    await run(*command, "--leave", str(servers[0].address))
    assert servers[0].shard.experts == {}
    await run(*command)
    assert set(servers[0].shard.experts) == {1, 2}
    assert all(len(experts) > 2 for experts in servers[0].shard.experts.values())


async def test_what_a_dead_server_owned_is_placed_elsewhere(
    servers: list[Server], capsys: pytest.CaptureFixture[str]
) -> None:
    low, middle, high = servers
    gone = str(middle.address)
    await stop(middle)
    command = ["rebalance", *addresses(servers), "--slots", "9", "--over", "0.1", "--pause", "0", "--apply"]
    assert await asyncio.to_thread(main, [*command, "--leave", gone]) == 0
    assert "12 experts have no owner; " in capsys.readouterr().out
    for layer in (1, 2):
        assert set(low.shard.experts[layer]) | set(high.shard.experts[layer]) == set(range(16))


async def test_the_manual_empties_a_server(small_model: Path) -> None:
    (fence,) = (one for one in Fence.all_of((ROOT / "docs/operations.md").read_text()) if one.mark == RUN_HERE)
    async with running_servers(small_model, (range(12), range(12, 16)), **OPTIONS) as (node0, node1):
        words = fence.code.replace("node0:50051", str(node0.address)).replace("node1:50051", str(node1.address)).split()
        words[words.index("--slots") + 1] = "16"
        assert words.pop(0) == "expertd"
        assert await asyncio.to_thread(main, words) == 0
        assert node1.shard.experts == {}


async def test_what_cannot_leave_is_named(servers: list[Server], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["rebalance", *addresses(servers), "--over", "0.1", "--pause", "0", "--apply", "--leave"]
    assert await asyncio.to_thread(main, [*command, "127.0.0.1:1"]) == 2
    assert "--leave 127.0.0.1:1 is none of the servers that were named" in capsys.readouterr().err
    assert await asyncio.to_thread(main, [*command, str(servers[0].address)]) == 2
    assert "the fleet has 10 slots for 16 experts; add servers, or give more --slots" in capsys.readouterr().err
    assert [len(one.shard.experts[1]) for one in servers] == [6, 6, 4]
