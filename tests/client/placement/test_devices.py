"""`expertd rebalance` of servers with several devices: what is made even is the load of devices."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertd.cli import main
from expertd.client.coordinator import Coordinator
from expertd.client.placement.exchanges import shares
from expertd.client.placement.present import Present, devices_of, look
from expertd.client.placement.proposal import propose
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.codec import DeviceInfo, ShardInfo
from expertd.server.app import Server
from tests.support.coordinators import LAYER, QUICK, expected, right_until, routing, tokens
from tests.support.fleets import addresses
from tests.support.serving import ANY_PORT, running_server

PATIENT = replace(QUICK, owner_timeout=20.0, max_attempts=20)
HOT = {"1": [60, *[4] * 15], "2": [*[4] * 7, 40, *[4] * 8]}


@pytest.fixture
async def servers(small_model: Path) -> AsyncIterator[list[Server]]:
    """Four devices with room for three experts each, two with room for four, and a server that is one."""
    options: dict[str, Any] = {"admin_listen": ANY_PORT}
    async with (
        running_server(small_model, range(8), devices=(0, 1, 2, 3), device_experts=3, **options) as four,
        running_server(small_model, range(8, 12), devices=(0, 1), device_experts=4, **options) as two,
        running_server(small_model, range(12, 16), **options) as one,
    ):
        yield [four, two, one]


@pytest.fixture
def loads(tmp_path: Path) -> str:
    (tmp_path / "loads.json").write_text(json.dumps(HOT))
    return str(tmp_path / "loads.json")


def has_all(servers: list[Server]) -> bool:
    """Whether every expert is on a device that computes it."""
    shards = [server.info for server in servers]
    return all(
        {expert for shard in shards for one in devices_of(shard) for expert in one.experts.get(layer, ())}
        == set(range(16))
        for layer in (1, 2)
    )


async def loads_of_devices(servers: list[Server]) -> list[float]:
    """Of each, over the mean one's, averaged over layers, as servers tell now who has what."""
    present = await look(addresses(servers), ClientSecurity())
    each = [
        shares(np.array(HOT[str(layer)], np.float64), present.held_of(layer).T, present.devices).sum(axis=0)
        for layer in (1, 2)
    ]
    return list(np.mean([one / one.mean() for one in each], axis=0))


async def test_devices_become_more_even_and_no_call_notices(
    servers: list[Server], small_model: Path, loads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rebalance", *addresses(servers), "--loads", loads, "--pause", "0.01"]
    assert await asyncio.to_thread(main, [*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["balancedness"]["before"] < 0.6 < 0.85 < plan["balancedness"]["after"]
    loads_then = [load for one in plan["device_loads"].values() for load in one["after"]]
    assert [len(one["after"]) for one in plan["device_loads"].values()] == [4, 2, 1]
    before = await loads_of_devices(servers)
    assert before == pytest.approx([load for one in plan["device_loads"].values() for load in one["before"]])
    async with Coordinator(addresses(servers), PATIENT) as moe:
        moving = asyncio.create_task(asyncio.to_thread(main, [*command, "--apply"]))
        assert await right_until(moving, moe, expected(small_model), lambda: has_all(servers)) == 0
    printed = capsys.readouterr().out
    assert "balancedness of 7 devices" in printed
    assert "busiest device" in printed
    assert await loads_of_devices(servers) == pytest.approx(loads_then)
    assert max(loads_then) < max(before) - 0.5
    assert all(
        len(its) <= one.room for server in servers[:2] for one in server.info.devices for its in one.experts.values()
    )
    assert await asyncio.to_thread(main, [*command, "--apply"]) == 0
    assert "not to be done: no move within these slots is worth it" in capsys.readouterr().out


async def test_a_server_of_several_devices_leaves(servers: list[Server], loads: str) -> None:
    leaving = ["--slots", "16", "--leave", str(servers[1].address), "--apply", "--pause", "0"]
    assert await asyncio.to_thread(main, ["rebalance", *addresses(servers), "--loads", loads, *leaving]) == 0
    assert servers[1].info.experts == {}
    assert has_all(servers)


async def test_what_a_lost_device_alone_had_is_placed_on_others(
    servers: list[Server], small_model: Path, loads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    four = servers[0]
    four.holdings.lose(four.node.devices[3], "a test", hangs=False)
    assert not has_all(servers)
    ids, weights = routing(20)
    command = ["rebalance", *addresses(servers), "--loads", loads, "--slots", "12", "--apply", "--pause", "0"]
    assert await asyncio.to_thread(main, command) == 0
    assert "balancedness of 6 devices" in capsys.readouterr().out
    assert has_all(servers)
    assert [one.experts for one in four.info.devices if one.lost] == [{}]
    async with Coordinator(addresses(servers), PATIENT) as moe:
        output = await moe(LAYER, tokens(20), topk_ids=ids, topk_weights=weights)
    assert relative_error(output, expected(small_model)) < 1e-5


def shard_of(*devices: DeviceInfo) -> ShardInfo:
    return ShardInfo("f", 1, {}, {3: (0, 1)}, 1, 1, 1, 1, "torch", "cpu", "", "1", "", devices=devices)


def test_lost_devices_are_not_counted() -> None:
    lost = DeviceInfo(1, "cpu", lost=True, room=2)
    several = shard_of(DeviceInfo(0, "cpu", room=2, experts={3: (0, 1)}), lost, DeviceInfo(2, "cpu", room=2))
    left = shard_of(DeviceInfo(0, "cpu", room=2, experts={3: (0, 1)}), lost)
    alone = shard_of(DeviceInfo(0, "cpu"))
    held = np.array([[[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]], np.bool_)
    present = Present(("a", "b", "c"), (several, left, alone), (3,), held)
    assert present.devices.tolist() == [2, 1, 1]
    assert present.slots(None, ()).tolist() == [[2, 2, 2, 2]]
    assert present.slots(3, ("b",)).tolist() == [[1, 1, 0, 3]]
    assert present.slots(8, ()).tolist() == [[2, 2, 2, 8]]
    proposal = propose(present, np.array([[6.0, 2, 2, 2]]), present.slots(None, ()))
    assert proposal.updates
    assert {number for one in proposal.updates for number in present.by_device(one.server, one.after)} <= {0, 2}
    assert proposal.after > proposal.before
    assert present.by_device(2, held[0, 3:]) == {}
