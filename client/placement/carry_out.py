"""A proposal carried out, one update after another, each after a look at the fleet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import numpy as np

from expertd.client.placement.admin import update_shard
from expertd.client.placement.present import Present
from expertd.client.placement.proposal import Proposal, Update
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.model.ranges import format_ranges
from expertd.proto.base.errors import StalePlacement


async def carry_out(
    proposal: Proposal, look_again: Callable[[], Awaitable[Present]], security: ClientSecurity, pause: float = 0.0
) -> AsyncGenerator[tuple[Update, int], None]:
    """Have servers make its updates; each that is done, with the bytes that were read for it.

    `security` is for their administration. `pause` seconds pass between updates: a call that meets one is repeated, and
    not for ever. It may end at any point: what was done counts, and the next proposal begins
    with it. Raises `InvalidPlan` before the first update where a server has no administration, `StalePlacement` where
    somebody else changed a server or an expert would lose its owner, and what servers answer.
    """
    for server in {update.server for update in proposal.updates}:
        proposal.present.admin_address(server)
    for update in proposal.updates:
        now = await look_again()
        layer, name = proposal.present.layers[update.row], proposal.present.servers[update.server]
        check(update, layer, name, now)
        server, experts = now.servers.index(name), np.flatnonzero(update.after.any(axis=0)).tolist()
        read = 0
        address, epoch = now.admin_address(server), now.shards[server].placement_epoch
        devices = {layer: now.by_device(server, update.after)}
        async with aclosing(update_shard(address, security, epoch, {layer: experts}, devices)) as telling:
            async for told in telling:
                read = told.read_bytes
        yield update, read
        await asyncio.sleep(pause)


def check(update: Update, layer: int, name: str, now: Present) -> None:
    """Raise `StalePlacement` unless server `name` owns what `update` begins with, and others what it is to give up."""
    held = now.held_of(layer)
    rows = now.rows[now.servers.index(name)] if name in now.servers else slice(0)
    if not np.array_equal(held[rows], update.before):
        raise StalePlacement(f"{name} was changed by somebody else; run it again")
    alone = update.given & ~np.delete(held, rows, axis=0).any(axis=0)
    if alone.any():
        raise StalePlacement(
            f"layer {layer}: nobody but {name} owns experts {format_ranges(np.flatnonzero(alone).tolist())} any more;"
            " run it again"
        )
