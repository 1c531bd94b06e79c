"""Which server should hold which experts, from the heat that was seen: pure functions over numpy arrays.

Balancedness of a layer is the mean heat of the servers over the largest: 1 is perfect, 1/2 means that the slowest
server has twice the mean to do. A layer takes as long as its slowest server, so over several layers it is the sum of
the means over the sum of the largest, each layer weighted alike. The copies of an expert share its heat equally. Where
servers have several devices, the devices are compared: a server decides itself which of them has what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from expertd.client.placement.packing import Booleans, Floats, Integers, bin_loads, pack_evenly, pack_once
from expertd.kernels.model.spread import spread

ROOMS = 5
"""How many divisions of servers' slots between experts and copies among devices are tried."""


class InvalidPlan(ValueError):
    """Heat, fleet or groups from which no placement can be made; the message names the field and the bound."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The servers to place on: how many experts each can hold, and which of them stand together."""

    slots: tuple[int, ...]
    """Experts that each server can hold."""
    nodes: tuple[int, ...]
    """The node (or rack) of each server."""
    names: tuple[str, ...]
    devices: int = 1
    """Of each server, which have its slots in equal parts."""

    def __post_init__(self) -> None:
        if not self.slots or min(self.slots) < 1:
            raise InvalidPlan(f"slots are {list(self.slots)[:8]}; give at least one server, each with 1 slot or more")
        if not len(self.slots) == len(self.nodes) == len(self.names):
            raise InvalidPlan("slots, nodes and names differ in length; give one of each for every server")
        if len(set(self.names)) < len(self.names):
            raise InvalidPlan("two servers have the same name; names must be distinct")
        for slots in self.slots:
            if self.devices < 1 or slots % self.devices:
                raise InvalidPlan(
                    f"devices is {self.devices}; it must divide the slots of every server, such as {slots}"
                )

    @classmethod
    def uniform(cls, servers: int, slots: int, nodes: int = 1, devices: int = 1) -> Fleet:
        """`servers` alike, in order and in equal parts on `nodes` nodes."""
        if nodes < 1 or servers % nodes:
            raise InvalidPlan(f"nodes is {nodes}; it must divide the number of servers, {servers}")
        node = tuple(server * nodes // servers for server in range(servers))
        return cls((slots,) * servers, node, tuple(f"server-{server}" for server in range(servers)), devices)

    def with_less_room(self, experts: int) -> list[Fleet]:
        """The same servers with room that has each of `experts` once at least, from the least to all that there is."""
        least = next(room for room in range(1, experts + 1) if sum(min(slots, room) for slots in self.slots) >= experts)
        rooms = np.linspace(least, max(self.slots), ROOMS).round().astype(int).tolist()
        return [
            replace(self, slots=tuple(min(slots, room) for slots in self.slots), devices=1) for room in sorted({*rooms})
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Which server holds which experts."""

    held: Booleans
    """[servers, experts]."""
    policy: str
    """hierarchical: groups of experts stay together on nodes; global: they do not."""

    def experts_of(self, server: int) -> tuple[int, ...]:
        return tuple(np.flatnonzero(self.held[server]).tolist())

    def copies(self) -> Integers:
        """[experts] int64: servers that hold each expert."""
        counts: Integers = self.held.sum(axis=0, dtype=np.int64)
        return counts

    def server_heat(self, heat: Floats) -> Floats:
        """[layers, servers] float64 for `heat` [layers, experts], in its unit."""
        shares: Floats = bin_loads(heat.T, self.held).T
        return shares

    def balancedness(self, heat: Floats) -> float:
        """0 to 1, over all layers of `heat` [layers, experts] that have any; 1 when none has."""
        return balancedness(self.server_heat(heat))


def balancedness(shares: Floats) -> float:
    """0 to 1 for the heat of servers, `shares` [layers, servers], over all layers that have any; 1 when none has."""
    shares = shares[shares.sum(axis=1) > 0]
    return float(len(shares) / (shares.max(axis=1) / shares.mean(axis=1)).sum()) if len(shares) else 1.0


def server_heat(placements: Sequence[Placement], heat: Floats) -> Floats:
    """[layers, servers] float64 for one placement for each layer of `heat` [layers, experts]."""
    return np.concatenate([one.server_heat(row[None]) for one, row in zip(placements, heat, strict=True)])


def device_heat(placements: Sequence[Placement], heat: Floats, fleet: Fleet) -> Floats:
    """[layers, servers x devices] float64, as `server_heat`, of all devices of each server in order, where
    `expertd serve --device-loads` has the same heat."""
    if fleet.devices == 1:
        return server_heat(placements, heat)
    shares = np.zeros((len(heat), len(fleet.slots), fleet.devices))
    for layer, (placement, row) in enumerate(zip(placements, heat, strict=True)):
        each = row / placement.copies()
        for server, slots in enumerate(fleet.slots):
            experts = placement.experts_of(server)
            held = spread(experts, fleet.devices, slots // fleet.devices, row[list(experts)].tolist())
            copies = np.bincount([expert for its in held for expert in its], minlength=len(row))
            for device, its in enumerate(held):
                shares[layer, server, device] = (each[list(its)] / copies[list(its)]).sum()
    return shares.reshape(len(heat), -1)


def place_by_layer(heat: Floats, fleet: Fleet, groups: int = 1) -> tuple[Placement, ...]:
    """A placement for each layer of `heat` [layers, experts], as `place` makes it of that layer alone."""
    _check(heat, fleet, groups)
    return tuple(place(row[None], fleet, groups) for row in heat)


def place(heat: Floats, fleet: Fleet, groups: int = 1) -> Placement:
    """One placement for all layers of `heat` [layers, experts]: every expert somewhere, none twice on one server.

    Experts form `groups` equal groups in order, as in group-limited routing. The groups stay together on nodes where
    the numbers allow: nodes divide the groups or are at least as many, and each node has room for its groups. Raises
    `InvalidPlan` for heat that is not finite numbers from 0 and for fleets with fewer slots than experts.

    What its experts leave of a server's slots holds copies among its devices, if it has several. How many slots do that
    is tried out, from as many as can be: all copies of an expert are in one server then, which is a node in EPLB's
    words.
    """
    _check(heat, fleet, groups)
    if fleet.devices == 1:
        return _place(heat, fleet, groups)
    tried = (_place(heat, room, groups) for room in fleet.with_less_room(heat.shape[1]))
    return max(tried, key=lambda one: balancedness(device_heat([one] * len(heat), heat, fleet)))


def _place(heat: Floats, fleet: Fleet, groups: int) -> Placement:
    slots = np.array(fleet.slots)
    held = _place_groups(heat.T, fleet, groups) if groups > 1 else None
    if held is not None:
        return Placement(held, "hierarchical")
    return Placement(pack_evenly(heat.T, slots), "global")


def _check(heat: Floats, fleet: Fleet, groups: int) -> None:
    if heat.ndim != 2 or not heat.size:
        raise InvalidPlan(f"loads have shape {list(heat.shape)}; they must be [layers, experts], neither of them 0")
    if not (np.isfinite(heat).all() and (heat >= 0).all()):
        raise InvalidPlan("loads hold a negative or not finite number; give counts or shares, 0 or more")
    experts = heat.shape[1]
    if groups < 1 or experts % groups:
        raise InvalidPlan(f"groups is {groups}; it must divide the number of experts, {experts}")
    if sum(fleet.slots) < experts:
        raise InvalidPlan(
            f"the fleet has {sum(fleet.slots)} slots for {experts} experts; add servers or slots to have as many"
        )


def _place_groups(heat: Floats, fleet: Fleet, groups: int) -> Booleans | None:
    """[servers, experts] with whole groups on nodes, for `heat` [experts, layers]; None where that cannot be."""
    slots, node_of = np.array(fleet.slots), np.array(fleet.nodes)
    nodes = np.unique(node_of)
    size = len(heat) // groups
    each = max(1, groups // len(nodes))
    room = min(int(slots[node_of == node].sum()) for node in nodes)
    if (groups % len(nodes) and len(nodes) < groups) or room < each * size:
        return None
    group_heat = heat.reshape(groups, size, -1).sum(axis=1)
    rooms = np.full(len(nodes), each)
    # Even nodes are not yet even servers, so two ways to spread the groups are carried to the end.
    spreads = [pack(group_heat, rooms) for pack in (pack_evenly, pack_once)]
    candidates = [_fill_nodes(heat, np.repeat(spread, size, axis=1), slots, node_of) for spread in spreads]
    return max(candidates, key=lambda held: Placement(held, "hierarchical").balancedness(heat.T))


def _fill_nodes(heat: Floats, on_node: Booleans, slots: Integers, node_of: Integers) -> Booleans:
    """[servers, experts]: the experts of each node, `on_node` [nodes, experts], on that node's servers."""
    held = np.zeros((len(slots), len(heat)), np.bool_)
    solved: dict[bytes, Booleans] = {}
    for node, mine in zip(np.unique(node_of), on_node, strict=True):
        servers, experts = np.flatnonzero(node_of == node), np.flatnonzero(mine)
        # Nodes that are alike get the same answer, which is found once.
        key = mine.tobytes() + slots[servers].tobytes()
        if key not in solved:
            solved[key] = pack_evenly(heat[experts], slots[servers])
        held[np.ix_(servers, experts)] = solved[key]
    return held
