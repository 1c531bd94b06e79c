"""What a fleet owns now, as its servers tell, and what its experts are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from expertd.client.fleet.ownership import resolve_ownership
from expertd.client.fleet.ports import TIMEOUT, port_at
from expertd.client.fleet.survey import Seen, survey
from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.heat import counts_of, read_heat
from expertd.client.placement.order import rows_of
from expertd.client.placement.packing import Booleans, Floats, Integers
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.model.config import MoeConfig
from expertd.proto.codec import DeviceInfo, ShardInfo


@dataclass(frozen=True, slots=True, eq=False)
class Present:
    """Servers that serve one model, what they own, and how to reach them."""

    servers: tuple[str, ...]
    shards: tuple[ShardInfo, ...]
    layers: tuple[int, ...]
    """Those that any of them has an expert of."""
    held: Booleans
    """[layers, devices, experts]: the devices of each server in order, as `devices_of` has them."""

    @property
    def devices(self) -> Integers:
        """[servers]: how many each has."""
        return np.array([len(devices_of(shard)) for shard in self.shards], np.int64)

    @property
    def rows(self) -> list[slice]:
        """Of each server, its devices."""
        return rows_of(self.devices)

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights as they are served."""
        shard = self.shards[0]
        return MoeConfig(**shard.config).expert_bytes * shard.weight_dtype.itemsize  # type: ignore[arg-type]

    def held_of(self, layer: int) -> Booleans:
        """[devices, experts]; none of a layer that nobody has."""
        return self.held[self.layers.index(layer)] if layer in self.layers else np.zeros_like(self.held[0])

    def slots(self, each: int | None, leaving: Collection[str]) -> Integers:
        """[layers, devices]: an equal part of `each` of a server, at most the room that its devices tell; without
        `each` that room, or else as many as it has of any layer, in the layers that it has. None for those that are
        leaving."""
        slots = np.zeros(self.held.shape[:2], np.int64)
        for name, shard, rows in zip(self.servers, self.shards, self.rows, strict=True):
            if name not in leaving:
                slots[:, rows] = _slots(self.held[:, rows].sum(axis=2), [one.room for one in devices_of(shard)], each)
        return slots

    def by_device(self, server: int, held: Booleans) -> dict[int, list[int]]:
        """The experts of `held` [devices of it, experts], by the numbers of its devices; empty where it is one."""
        numbers = [one.number for one in devices_of(self.shards[server]) if one.room]
        return {number: np.flatnonzero(its).tolist() for number, its in zip(numbers, held, strict=False)}

    def admin_address(self, server: int) -> str:
        """Where what it owns is changed. Raises `InvalidPlan`."""
        told = self.shards[server].admin_address
        if not told:
            raise InvalidPlan(f"{self.servers[server]} has no administration; start it with --admin-listen")
        return port_at(told, self.servers[server])


async def look(servers: Sequence[str], security: ClientSecurity, leaving: Collection[str] = ()) -> Present:
    """Ask all `servers` at once; one that is leaving need not answer.

    Raises `InvalidPlan` where another does not serve, `ModelMismatch` where models or weights differ.
    """
    seen = await survey(servers, security, TIMEOUT)
    here = [one for one in seen if one.shard is not None and one.health == "SERVING"]
    _check(seen, [one.address for one in here], leaving)
    told = [(one.address, one.shard) for one in here if one.shard is not None]
    if not told:
        raise InvalidPlan("no server serves")
    owned = resolve_ownership(told).owned
    layers = tuple(layer for layer in sorted(owned) if owned[layer].any())
    names, shards = zip(*told, strict=True)
    devices = [device for shard in shards for device in devices_of(shard)]
    held = np.zeros((len(layers), len(devices), shards[0].routed_experts), np.bool_)
    for place, device in enumerate(devices):
        for row, layer in enumerate(layers):
            held[row, place, list(device.experts.get(layer, ()))] = True
    return Present(names, shards, layers, held)


def devices_of(shard: ShardInfo) -> tuple[DeviceInfo, ...]:
    """Those that compute for a server; one that has all where it does not tell of several."""
    several = tuple(one for one in shard.devices if one.room and not one.lost)
    return several or (DeviceInfo(0, shard.device, experts=shard.experts),)


def _check(seen: Sequence[Seen], here: Collection[str], leaving: Collection[str]) -> None:
    strangers = set(leaving) - {one.address for one in seen}
    if strangers:
        raise InvalidPlan(f"--leave {sorted(strangers)[0]} is none of the servers that were named")
    for one in seen:
        if one.address not in here and one.address not in leaving:
            raise InvalidPlan(f"{one.address} does not serve: {one.health}; --leave it, or wait until it does")


def _slots(counts: Integers, rooms: Sequence[int], each: int | None) -> Integers:
    """[layers, devices] of one server that has `counts` [layers, devices] experts; a room of 0 is not told."""
    if each is not None:
        return np.array([min(each // len(rooms), room or each) for room in rooms]) * np.ones_like(counts)
    return np.where(counts.any(axis=1, keepdims=True), np.where(rooms, rooms, counts.max(axis=0)), 0)


async def heat_of(present: Present, seconds: float) -> Floats:
    """[layers, experts]: pairs that were computed in the next `seconds`, as the servers' metrics count them.

    Raises `InvalidPlan` where a server does not count by expert.
    """
    pages = [
        f"http://{port_at(shard.metrics_address, server)}/metrics"
        for server, shard in zip(present.servers, present.shards, strict=True)
        if any(shard.experts.values())
    ]
    before = await asyncio.gather(*(asyncio.to_thread(counts_of, page) for page in pages))
    await asyncio.sleep(seconds)
    after = await asyncio.gather(*(asyncio.to_thread(counts_of, page) for page in pages))
    heat = np.zeros((len(present.layers), present.held.shape[2]))
    rows = {layer: row for row, layer in enumerate(present.layers)}
    for old, new in zip(before, after, strict=True):
        for layer, expert in old.keys() & new.keys():
            grown = new[layer, expert] - old[layer, expert]
            # One that was started anew counts from 0.
            heat[rows[layer], expert] += grown if grown >= 0 else new[layer, expert]
    return heat


def recorded_heat(present: Present, sources: Sequence[str]) -> Floats:
    """[layers, experts] from files or URLs, as `read_heat` reads them. Raises `InvalidPlan`."""
    layers, heat = read_heat(sources)
    missing = set(present.layers) - set(layers)
    if missing or heat.shape[1] != present.held.shape[2]:
        lacking = f"says nothing of layer {min(missing)}" if missing else f"is of {heat.shape[1]} experts"
        raise InvalidPlan(f"--loads {lacking}; the servers have {present.held.shape[2]} of each layer")
    rows = {layer: row for row, layer in enumerate(layers)}
    return heat[[rows[layer] for layer in present.layers]]
