"""`expertd status`: fleets that are whole, have holes, or hold what does not belong together."""

import asyncio
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from expertd.cli import main
from expertd.client.fleet.survey import Seen, judge
from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.heat import read_heat
from expertd.client.tools.top import look
from expertd.proto.codec import GenerationInfo, ShardInfo
from tests.support.fleets import running_servers

HALVES = (range(8), range(8, 16))
GONE = "127.0.0.1:1"


@pytest.fixture
async def halves(small_model: Path) -> list[ShardInfo]:
    async with running_servers(small_model, HALVES) as servers:
        return [server.info for server in servers]


def fleet(*shards: ShardInfo) -> list[Seen]:
    return [Seen(f"node{index}:50051", "SERVING", shard) for index, shard in enumerate(shards)]


def but(shard: ShardInfo, **changes: Any) -> ShardInfo:  # noqa: ANN401
    return dataclasses.replace(shard, **changes)


async def test_what_is_missing_or_mixed_is_told(halves: list[ShardInfo]) -> None:
    low, high = halves
    assert judge(fleet(low, high)).problems == ()
    assert judge(fleet(low, high, low)).replicas == (1, 2)
    (hole,) = judge(fleet(low)).problems
    assert hole == "layers 1-2: nobody owns experts 8, 9, 10, 11, 12, 13, 14, 15 (--experts 8-15)"
    (models,) = judge(fleet(low, but(high, model_fingerprint="other"))).problems
    assert models.startswith("mixed models: ")
    assert models.endswith("'other' on node1:50051")
    mixed = judge(fleet(low, but(high, model_fingerprint="other"), high))
    assert mixed.notes[:1] == (f"of {low.model_fingerprint!r}: whole",)
    assert mixed.notes[1].startswith(
        "of 'other': layers 1-2: nobody owns experts 0, 1, 2, 3, 4, 5, 6, 7 (--experts 0-7"
    )
    damaged = but(low, expert_digests=bytes(len(low.expert_digests)))
    (differing,) = judge(fleet(low, high, damaged)).problems
    assert "hold different weights of layer 1, expert 0" in differing
    upgraded = judge(fleet(low, but(high, version="0.2.0")))
    assert upgraded.problems == ()
    assert upgraded.notes == (f"mixed versions: {low.version!r} on node0:50051; '0.2.0' on node1:50051",)
    coming = GenerationInfo("newer", share=0.25)
    rolled = judge(fleet(but(low, next=coming), but(high, next=coming)))
    assert rolled.notes == ("next weights 'newer' for 25% of calls on node0:50051, node1:50051",)


async def test_a_fleet_is_whole_by_either_port(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running_servers(small_model, HALVES) as servers:
        low, high = servers
        whole = [str(low.address), str(high.metrics_address)]
        assert await asyncio.to_thread(main, ["status", *whole]) == 0
        said = capsys.readouterr().out
        assert all(part in said for part in (str(high.address), "8-15", "every expert has 1 to 1 owners", "OK"))
        assert await asyncio.to_thread(main, ["status", "--json", str(low.address), GONE]) == 1
        told = json.loads(capsys.readouterr().out)
        assert told["servers"][0]["placement_epoch"] == low.info.placement_epoch
        assert told["servers"][1]["health"].startswith("UNAVAILABLE")
        assert any("nobody owns experts 8" in problem for problem in told["problems"])
        high.health.set_serving(False)
        assert await asyncio.to_thread(main, ["status", *whole]) == 1
        assert f"{high.address} does not serve: NOT_SERVING" in capsys.readouterr().out
        high.health.set_serving(True)


async def test_80_columns_cut_neither_addresses_nor_health(
    small_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    async with running_servers(small_model, HALVES) as servers:
        servers[1].health.set_serving(False)
        addresses = [str(server.address) for server in servers]
        assert await asyncio.to_thread(main, ["status", *addresses]) == 1
        servers[1].health.set_serving(True)
    rows = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    for address, health in zip(addresses, ("SERVING", "NOT_SERVING"), strict=True):
        assert any(row.split()[:2] == [address, health] for row in rows)


async def test_the_wrong_port_is_named_where_only_one_will_do(small_model: Path) -> None:
    async with running_servers(small_model, [range(16)]) as (server,):
        (seen,) = await look([str(server.address)])
        assert seen.problem == "no HTTP is spoken there; give the address of its --metrics"
        with pytest.raises(InvalidPlan, match="speaks no HTTP; give the /metrics of a server's metrics port"):
            await asyncio.to_thread(read_heat, [f"http://{server.address}/metrics"])


def test_what_is_no_address_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "localhost"]) == 2
    assert "without a port" in capsys.readouterr().err
