"""What `expertd rebalance --apply` does to running servers, and what it leaves when it ends half-way."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from expertd.cli import main
from expertd.client.coordinator import Coordinator
from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.carry_out import carry_out
from expertd.client.placement.present import Present, look
from expertd.client.placement.proposal import Proposal, propose
from expertd.client.transport.security import ClientSecurity
from expertd.proto.base.errors import StalePlacement
from expertd.server.app import Server
from tests.support.coordinators import QUICK, expected, right_until
from tests.support.fleets import addresses, running_servers
from tests.support.serving import ANY_PORT, running_server

PATIENT = replace(QUICK, owner_timeout=20.0, max_attempts=20)
"""A machine under test is busy."""
SHARDS = (range(6), range(6, 12), range(12, 16))
HOT = {"1": [90, 80, *[1] * 14], "2": [*[1] * 14, 80, 90]}
PLAIN = ClientSecurity()
SLOTS = 7


@pytest.fixture
async def servers(small_model: Path) -> AsyncIterator[list[Server]]:
    async with running_servers(small_model, SHARDS, admin_listen=ANY_PORT) as started:
        yield started


async def proposed(servers: list[Server]) -> Proposal:
    present = await look(addresses(servers), PLAIN)
    return propose(present, np.array(list(HOT.values()), np.float64), present.slots(SLOTS, ()))


def is_whole(servers: list[Server]) -> bool:
    return all(
        set().union(*(one.shard.experts.get(layer, ()) for one in servers)) == set(range(16)) for layer in (1, 2)
    )


async def test_experts_move_by_one_command_and_no_call_notices(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loads.json").write_text(json.dumps(HOT))
    (tmp_path / "token").write_text("secret\n")
    options = {"admin_listen": ANY_PORT, "admin_token_file": tmp_path / "token"}
    command = ["--loads", str(tmp_path / "loads.json"), "--slots", str(SLOTS), "--apply", "--pause", "0.01"]
    async with running_servers(small_model, SHARDS, **options) as servers:
        assert await asyncio.to_thread(main, ["rebalance", *addresses(servers), *command]) == 1
        assert "authorization is missing" in capsys.readouterr().err
        command += ["--admin-token-file", str(tmp_path / "token")]
        async with Coordinator(addresses(servers), PATIENT) as moe:
            moving = asyncio.create_task(asyncio.to_thread(main, ["rebalance", *addresses(servers), *command]))
            assert await right_until(moving, moe, expected(small_model), lambda: is_whole(servers)) == 0
        printed = capsys.readouterr().out
        assert all(len(experts) <= SLOTS for one in servers for experts in one.shard.experts.values())
        moves = int(printed.split(" experts to read")[0].split()[-1])
        assert f"{moves * servers[0].shard.config.expert_bytes} bytes read" in printed
        assert await asyncio.to_thread(main, ["rebalance", *addresses(servers), *command]) == 0
        assert "not to be done: no move within these slots is worth it" in capsys.readouterr().out


async def test_what_ended_half_way_is_taken_up_again(servers: list[Server]) -> None:
    """Each time another process begins, knows nothing of the last one, and ends after two updates."""
    runs, proposal = 0, await proposed(servers)
    while proposal.updates:
        runs, done = runs + 1, 0
        async for _ in carry_out(proposal, lambda: look(addresses(servers), PLAIN), PLAIN):
            assert is_whole(servers)
            done += 1
            if done == 2:
                break
        proposal = await proposed(servers)
    assert 1 < runs < 20
    assert proposal.before > 0.95


async def test_what_somebody_else_changed_is_not_overwritten(servers: list[Server]) -> None:
    proposal, other = await proposed(servers), await proposed(servers)
    looks = [await look(addresses(servers), PLAIN)]

    async def stale() -> Present:
        return looks[0]

    async for _ in carry_out(other, lambda: look(addresses(servers), PLAIN), PLAIN):
        break
    with pytest.raises(StalePlacement, match=r"was changed by somebody else; run it again"):
        async for _ in carry_out(proposal, lambda: look(addresses(servers), PLAIN), PLAIN):
            pass
    # Even if it did not look, its server would.
    with pytest.raises(StalePlacement, match=r"placement_epoch is"):
        async for _ in carry_out(proposal, stale, PLAIN):
            pass
    assert is_whole(servers)


async def test_a_last_owner_keeps_its_experts(servers: list[Server]) -> None:
    proposal = await proposed(servers)

    async def lonely() -> Present:
        """Another server has lost what is about to be given up."""
        now = await look(addresses(servers), PLAIN)
        for update in proposal.updates:
            held = now.held_of(now.layers[update.row])
            if update.given.any() and (held[update.server] == update.before).all():
                held[np.arange(len(held)) != update.server] &= ~update.given
        return now

    with pytest.raises(StalePlacement, match=r"layer \d: nobody but 127.0.0.1:\d+ owns experts .* any more; run it"):
        async for _ in carry_out(proposal, lonely, PLAIN):
            pass
    assert is_whole(servers)


@pytest.mark.parametrize("without", range(3))
async def test_a_server_without_administration_is_named_before_anything_moves(small_model: Path, without: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        servers = []
        for index, shard in enumerate(SHARDS):
            options = {} if index == without else {"admin_listen": ANY_PORT}
            servers.append(await stack.enter_async_context(running_server(small_model, shard, **options)))
        proposal, before = await proposed(servers), [server.info for server in servers]
        complaint = f"{servers[without].address} has no administration; start it with --admin-listen"
        with pytest.raises(InvalidPlan, match=complaint):
            async for _ in carry_out(proposal, lambda: look(addresses(servers), PLAIN), PLAIN):
                pass
        assert [server.info for server in servers] == before
