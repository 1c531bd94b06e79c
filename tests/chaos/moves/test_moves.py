"""Experts that move, and copies that come and go, while all are called; and servers that are killed meanwhile."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from expertd.client.base.quantiles import p50_p99
from expertd.client.placement.admin import update_shard
from expertd.client.transport.security import ClientSecurity
from expertd.proto.base.errors import ExpertdError
from tests.chaos.fleet import Fleet, ServerProcess
from tests.chaos.load import CheckedLoad
from tests.chaos.moves.administered import ADMIN, look
from tests.chaos.scale import hold, scaled

LAYERS, EXPERTS = (1, 2), range(16)
CHANGES, KILLS = scaled(50, 6), scaled(20, 2)
CALLS = 20


async def own(server: ServerProcess, layer: int, experts: Iterable[int]) -> None:
    epoch = (await look(server)).placement_epoch
    async for _ in update_shard(server.admin, ClientSecurity(), epoch, {layer: sorted(experts)}):
        pass


async def owners(servers: Iterable[ServerProcess]) -> dict[tuple[int, int], list[ServerProcess]]:
    """Of each expert of each layer, by what servers tell."""
    told = [(server, (await look(server)).experts) for server in servers]
    return {
        (layer, expert): [server for server, experts in told if expert in experts.get(layer, ())]
        for layer in LAYERS
        for expert in EXPERTS
    }


async def change(servers: list[ServerProcess], chance: random.Random) -> None:
    """Move a few experts of a layer from one server to another, or give it copies, or take copies away."""
    layer, (source, target) = chance.choice(LAYERS), chance.sample(servers, 2)
    theirs = set((await look(source)).experts.get(layer, ()))
    ours = set((await look(target)).experts.get(layer, ()))
    moved = set(chance.sample(sorted(theirs), min(len(theirs), chance.randint(1, 4))))
    if not moved <= ours:
        await own(target, layer, ours | moved)
    held = await owners(servers)
    spare = {expert for expert in moved if len(held[layer, expert]) > 1}
    if spare and chance.random() < 0.8:
        await own(source, layer, theirs - spare)
    assert all((await owners(servers)).values())


async def test_placements_that_change_are_not_noticed(small_model: Path, tmp_path: Path) -> None:
    chance = random.Random(7)
    async with Fleet(small_model, tmp_path) as fleet:
        servers = [await fleet.start(experts, options=ADMIN) for experts in ("0-3", "4-7", "8-11", "12-15")]
        load = CheckedLoad([server.address for server in servers], small_model)
        async with load:
            await load.answered(10 * CALLS)
            before = list(load.report.seconds)
            for _ in range(CHANGES):
                await change(servers, chance)
                await load.answered(CALLS)
            during = load.report.seconds[len(before) :]
        hold(load.report, f"{CHANGES} placements", CHANGES * CALLS)
        (_, calm), (_, moving) = p50_p99(before), p50_p99(during)
        print(f"p99 {calm * 1e3:.1f} ms before, {moving * 1e3:.1f} ms while placements change: {moving / calm:.2f}x")
        assert load.report.failed == 0


async def test_servers_that_are_killed_while_they_change_are_not_noticed(small_model: Path, tmp_path: Path) -> None:
    chance = random.Random(8)
    async with Fleet(small_model, tmp_path) as fleet:
        servers = [await fleet.start(experts, options=ADMIN) for experts in ("0-7", "0-7", "8-15", "8-15")]
        load = CheckedLoad([server.address for server in servers], small_model)
        async with load:
            await load.answered(CALLS)
            for round_ in range(KILLS):
                place = round_ % len(servers)
                server = servers[place]
                updating = asyncio.ensure_future(own(server, chance.choice(LAYERS), EXPERTS))
                await asyncio.sleep(chance.uniform(0, 0.05))
                server.signal(signal.SIGKILL)
                await server.exit_code()
                with contextlib.suppress(ExpertdError):
                    await asyncio.wait_for(updating, 20)
                servers[place] = await fleet.restart(server, options=ADMIN)
                await load.uses(servers[place].address, since=time.monotonic())
                await load.answered(CALLS)
        hold(load.report, f"{KILLS} servers killed while they change", KILLS * CALLS)
        assert load.report.failed == 0
