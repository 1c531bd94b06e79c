"""What should move in a fleet: from its placement and heat to updates in order, and what they cost and bring."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from expertd.client.placement.moves import loads_of, replan
from expertd.client.placement.order import order
from expertd.client.placement.packing import Booleans, Floats, Integers
from expertd.client.placement.present import Present
from expertd.kernels.model.ranges import format_ranges


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """Other experts of one layer for one server."""

    row: int
    """Of the layer, in `Present.layers`."""
    server: int
    before: Booleans
    after: Booleans
    """[devices of it, experts]"""

    @property
    def taken(self) -> Booleans:
        """[experts]: those that it reads, for one device or several."""
        return np.asarray((self.after & ~self.before).any(axis=0))

    @property
    def given(self) -> Booleans:
        """[experts]: those that it owns no more."""
        return np.asarray(self.before.any(axis=0) & ~self.after.any(axis=0))


@dataclass(frozen=True)
class Proposal:
    """A better placement, a few moves from the present one."""

    present: Present
    heat: Floats
    """[layers, experts]"""
    slots: Integers
    """[layers, devices]"""
    target: Booleans
    """[layers, devices, experts]"""

    @cached_property
    def updates(self) -> tuple[Update, ...]:
        """In an order in which no expert is without an owner."""
        found, rows, devices = [], self.present.rows, self.present.devices
        for row, (held, target, slots) in enumerate(zip(self.present.held, self.target, self.slots, strict=True)):
            now = held.copy()
            for server, after in order(held, target, slots, devices):
                found.append(Update(row, server, now[rows[server]].copy(), after))
                now[rows[server]] = after
        return tuple(found)

    @property
    def moves(self) -> int:
        """Experts that are read."""
        return sum(int(update.taken.sum()) for update in self.updates)

    @property
    def bytes(self) -> int:
        return self.moves * self.present.expert_bytes

    @property
    def lost(self) -> int:
        """Experts that nobody owns."""
        return int((~self.present.held.any(axis=1)).sum())

    def idle(self, held: Booleans) -> tuple[str, ...]:
        """Servers that own nothing in `held` [layers, devices, experts], and have no slots."""
        busy = np.asarray(held.any(axis=(0, 2)) | self.slots.any(axis=0))
        return tuple(
            name for name, rows in zip(self.present.servers, self.present.rows, strict=True) if not busy[rows].any()
        )

    @property
    def is_due(self) -> bool:
        """Whether it must be done however even loads are: experts have no owner, or a device no slots for its own."""
        return bool(self.lost or (self.present.held.sum(axis=2) > self.slots).any())

    def loads(self, held: Booleans) -> Floats:
        """[layers with heat, devices]: 1 is a mean device's; NaN that of a device without a part in the layer."""
        busy, devices = self.heat.any(axis=1), self.present.devices
        loads = np.array([loads_of(heat, one, devices) for heat, one in zip(self.heat[busy], held[busy], strict=True)])
        loads = loads.reshape(-1, held.shape[1])
        counted = (self.slots[busy] > 0) | held[busy].any(axis=2)
        loads = np.where(counted, loads, np.nan)
        return loads / np.nanmean(loads, axis=1, keepdims=True) if len(loads) else loads

    def mean_loads(self, held: Booleans) -> list[Floats]:
        """Of each server [devices of it]: over layers; 0 for a device that has no part in any."""
        loads = self.loads(held)
        means: Floats = np.nan_to_num(loads).sum(axis=0) / np.maximum((~np.isnan(loads)).sum(axis=0), 1)
        return [means[rows] for rows in self.present.rows]

    @property
    def before(self) -> float:
        """Balancedness now."""
        return _balancedness(self.loads(self.present.held))

    @property
    def after(self) -> float:
        return _balancedness(self.loads(self.target))

    def summary(self, rate: int | None) -> str:
        """In one line; `rate` is bytes a second that servers read, if that is known."""
        lost = f"{self.lost} experts have no owner; " if self.lost else ""
        takes = f", {self.bytes / rate:.0f} s at {rate / 1e9:.3g} GB/s" if rate else ""
        several = f" of {self.slots.shape[1]} devices" if (self.present.devices > 1).any() else ""
        return (
            f"{lost}balancedness{several} (mean load / largest, over all layers) {self.before:.4f} -> {self.after:.4f}:"
            f" {self.moves} experts to read, {self.bytes / 1e9:.3g} GB{takes}, in {len(self.updates)} updates"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "balancedness": {"before": self.before, "after": self.after},
            "moves": self.moves,
            "bytes": self.bytes,
            "updates": [
                {
                    "server": self.present.servers[update.server],
                    "layer": self.present.layers[update.row],
                    "takes": format_ranges(np.flatnonzero(update.taken).tolist()),
                    "gives": format_ranges(np.flatnonzero(update.given).tolist()),
                    "devices": {
                        number: format_ranges(its)
                        for number, its in self.present.by_device(update.server, update.after).items()
                    },
                }
                for update in self.updates
            ],
            "device_loads": {
                name: {"before": before.tolist(), "after": after.tolist()}
                for name, before, after in zip(
                    self.present.servers, self.mean_loads(self.present.held), self.mean_loads(self.target), strict=True
                )
            },
        }


def propose(present: Present, heat: Floats, slots: Integers, most_moves: int | None = None) -> Proposal:
    """See `replan`. Raises `InvalidPlan`."""
    return Proposal(present, heat, slots, replan(heat, present.held, slots, most_moves, present.devices))


def reason_to_wait(proposal: Proposal, below: float, gain: float) -> str | None:
    """Why what is proposed should not be done yet: the fleet is even enough, or would hardly become more so."""
    if not proposal.updates:
        return f"no move within these slots is worth it; balancedness is {proposal.before:.4f}"
    if proposal.is_due:
        return None
    if proposal.before >= below:
        return f"balancedness {proposal.before:.4f} is not below --below {below:g}"
    if proposal.after - proposal.before < gain:
        return f"balancedness would gain {proposal.after - proposal.before:.4f}, less than --gain {gain:g}"
    return None


def _balancedness(loads: Floats) -> float:
    """As of `assignment`, for devices that are not in all layers."""
    return float(len(loads) / np.nanmax(loads, axis=1).sum()) if len(loads) else 1.0
