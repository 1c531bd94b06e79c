"""`expertd rebalance`: what it proposes for running servers, and for fleets whose loads change."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from expertd.cli import main
from expertd.client.placement.packing import Booleans, Floats
from expertd.client.placement.present import Present
from expertd.client.placement.proposal import Proposal, propose, reason_to_wait
from expertd.kernels.model.ranges import parse_ranges
from expertd.proto.codec import ShardInfo
from expertd.server.app import Server
from tests.support.fleets import addresses, running_servers
from tests.support.serving import ANY_PORT, execute_method, open_channel, random_batch, request_for

SHARDS = (range(6), range(6, 12), range(12, 16))
HOT = {"1": [90, 80, *[1] * 14], "2": [*[1] * 14, 80, 90]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers(small_model: Path) -> AsyncIterator[list[Server]]:
    async with running_servers(small_model, SHARDS, per_expert_metrics=True, admin_listen=ANY_PORT) as started:
        yield started


@pytest.fixture
def loads(tmp_path: Path) -> str:
    (tmp_path / "loads.json").write_text(json.dumps(HOT))
    return str(tmp_path / "loads.json")


async def rebalance(*arguments: str) -> int:
    return await asyncio.to_thread(main, ["rebalance", *arguments])


def applied(proposal: dict[str, Any], held: dict[str, dict[int, set[int]]]) -> Iterator[dict[str, dict[int, set[int]]]]:
    """What servers hold after each of the updates."""
    for update in proposal["updates"]:
        mine = held[update["server"]][update["layer"]]
        mine |= set(parse_ranges(update["takes"]) if update["takes"] else ())
        mine -= set(parse_ranges(update["gives"]) if update["gives"] else ())
        yield held


@pytest.mark.asyncio(loop_scope="module")
async def test_what_would_move_is_told(servers: list[Server], loads: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = [str(servers[0].metrics_address), *addresses(servers[1:])]
    assert await rebalance(*named, "--loads", loads, "--slots", "7", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["balancedness"]["before"] < 0.5 < 0.9 < told["balancedness"]["after"]
    assert told["bytes"] == told["moves"] * servers[0].shard.config.expert_bytes
    held = {str(one.address): {layer: set(mine) for layer, mine in one.shard.experts.items()} for one in servers}
    for now in applied(told, held):
        for layer in (1, 2):
            assert set().union(*(mine[layer] for mine in now.values())) == set(range(16))
        assert all(len(mine[layer]) <= 7 for mine in now.values() for layer in (1, 2))
    assert await rebalance(*named, "--loads", loads, "--slots", "7", "--rate", "1e6") == 0
    printed = capsys.readouterr().out
    assert f"{told['balancedness']['before']:.4f} -> {told['balancedness']['after']:.4f}" in printed
    assert f"{told['moves']} experts to read" in printed
    assert f"{told['bytes'] / 1e6:.0f} s at 0.001 GB/s" in printed
    limited = ("--slots", "7", "--most-bytes", str(2 * servers[0].shard.config.expert_bytes), "--json")
    assert await rebalance(*named, "--loads", loads, *limited) == 0
    assert json.loads(capsys.readouterr().out)["moves"] == 2


@pytest.mark.asyncio(loop_scope="module")
async def test_loads_are_those_of_the_time_that_it_watches(
    servers: list[Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "servers").write_text("\n".join(addresses(servers)))
    fleet = ("--servers-file", str(tmp_path / "servers"), "--slots", "8", "--below", "1", "--json")
    async with open_channel(servers[0]) as channel:
        call = execute_method(channel)
        # What came before is not looked at.
        for _ in range(3):
            await call(request_for(servers[0], random_batch(60, 256, 6, 4), layer=2))
        watching = asyncio.create_task(rebalance(*fleet, "--over", "2"))
        await asyncio.sleep(0.7)
        while not watching.done():
            await call(request_for(servers[0], random_batch(60, 256, 6, 4), layer=1))
            await asyncio.sleep(0.05)
    assert await watching == 0
    told = json.loads(capsys.readouterr().out)
    assert {update["layer"] for update in told["updates"]} == {1}
    assert told["balancedness"]["after"] > told["balancedness"]["before"] + 0.2
    assert await rebalance(*addresses(servers), "--over", "0.1") == 2
    assert "there was no traffic at all" in capsys.readouterr().err


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["127.0.0.1:1"], "127.0.0.1:1 does not serve: "),
        ([], "give all servers as ADDRESS..., or --servers-file, or --dns: one of them"),
        (["127.0.0.1:1", "--dns", "localhost:2"], "one of them"),
        (["--dns", "localhost"], "--dns is 'localhost'; give HOST:PORT"),
        (["--servers-file", "nothing.txt"], "nothing.txt"),
    ],
)
async def test_what_is_no_fleet_is_named(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await rebalance(*options) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.asyncio(loop_scope="module")
async def test_loads_of_other_models_are_refused(
    servers: list[Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, complaint in (({"1": [1] * 16}, "says nothing of layer 2"), ({"1": [1], "2": [1]}, "is of 1 experts")):
        (tmp_path / "loads.json").write_text(json.dumps(content))
        assert await rebalance(*addresses(servers), "--loads", str(tmp_path / "loads.json")) == 2
        assert complaint in capsys.readouterr().err


def fleet(held: Booleans) -> Present:
    """Of `held` [layers, servers, experts] on servers that tell what DeepSeek-V3's do."""
    info = ShardInfo("f", 1, {}, {}, 1, 1, 1, 1, "torch", "cpu", "", "1", "")
    names = tuple(f"node{server}:50051" for server in range(held.shape[1]))
    return Present(names, (info,) * held.shape[1], tuple(range(3, 3 + len(held))), held)


def propose_for(held: Booleans, heat: Floats, slots: int, most: int | None = None) -> Proposal:
    return propose(fleet(held), heat, np.full(held.shape[:2], slots), most)


def test_loads_that_change_every_round_are_even_after_two() -> None:
    """Zipf 1.0, other ranks in every round; half of the moves that it takes in a round."""
    random, layers, servers, experts = np.random.default_rng(3), 12, 8, 256
    held = np.stack([np.repeat(np.eye(servers, dtype=np.bool_), experts // servers, axis=1)] * layers)
    for number in range(5):
        heat = np.stack([random.permutation(np.arange(1, experts + 1.0) ** -1) for _ in range(layers)])
        for part in range(2):
            seen = random.poisson(heat * 20_000).astype(np.float64)
            proposal = propose_for(held, seen, 40, most=8 * layers)
            assert (proposal.moves <= 8 * layers) == (proposal.moves > 0)
            held = proposal.target
            true = Proposal(proposal.present, heat, proposal.slots, held)
            print(f"loads {number}, round {part}: {true.before:.3f} -> {true.after:.3f}, {proposal.moves} moves")
        assert true.after > 0.9


def test_a_little_is_not_worth_it_and_what_is_due_is_done() -> None:
    held = np.repeat(np.eye(4, dtype=np.bool_), 2, axis=1)[None]
    uneven = propose_for(held, np.array([[8.0, 8, 1, 1, 1, 1, 1, 1]]), 3)
    assert reason_to_wait(uneven, below=0.95, gain=0.01) is None
    assert reason_to_wait(uneven, below=0.3, gain=0.01) == "balancedness 0.3438 is not below --below 0.3"
    assert "less than --gain 0.9" in str(reason_to_wait(uneven, below=0.95, gain=0.9))
    even = propose_for(held, np.ones((1, 8)), 3)
    assert reason_to_wait(even, 0.95, 0.01) == "no move within these slots is worth it; balancedness is 1.0000"
    held[0, 0, 0] = False
    assert reason_to_wait(propose_for(held, np.ones((1, 8)), 3), below=0.1, gain=0.5) is None


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--pause", "-1", "-1 is no pause; it must be at least 0"),
        ("--below", "1.5", "1.5 is no balancedness; it must be from 0 to 1"),
        ("--slots", "0", "0 is no count; it must be at least 1"),
        ("--most-bytes", "inf", "inf is no count"),
        ("--watch", "0", "0 is not a time"),
    ],
)
def test_values_that_cannot_be_are_named(
    option: str, value: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["rebalance", option, value, "127.0.0.1:1"])
    assert f"argument {option}: {complaint}" in capsys.readouterr().err
