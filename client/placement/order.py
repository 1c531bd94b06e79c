"""In which order servers take over and give up experts: pure functions that never leave one without an owner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.packing import Booleans, Integers

Step = tuple[int, Booleans]
"""A server, and all that it holds from then on: [devices of it, experts]."""


def rows_of(devices: Integers) -> list[slice]:
    """The devices of each server, among those of all; `devices` [servers] is how many each has."""
    ends = np.cumsum(devices).tolist()
    return [slice(end - count, end) for end, count in zip(ends, devices.tolist(), strict=True)]


def order(present: Booleans, target: Booleans, slots: Integers, devices: Integers | None = None) -> Iterator[Step]:
    """From `present` to `target` [devices, experts] of one layer, one server after another.

    Whoever takes over does so before others give up. At every instant each expert that has an owner in `present` has
    one, and no device holds more than `slots` [devices], or than at present. Where a few must change places and
    nobody has room, experts are parked on a third device meanwhile. `devices` [servers] is how many each server has
    (None: one). Raises `InvalidPlan` where nobody has a slot free or a copy too many.
    """
    change = _Change(
        present.copy(),
        target,
        np.maximum(slots, present.sum(axis=1)),
        rows_of(np.ones(len(present), np.int64) if devices is None else devices),
    )
    while (change.held != target).any():
        steps = list(change.takers()) or list(change.givers())
        yield from steps or change.park()


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """How far it is; `held` follows what is yielded."""

    held: Booleans
    target: Booleans
    """[devices, experts]"""
    room: Integers
    """[devices]"""
    rows: list[slice]
    """Of each server."""

    def takers(self) -> Iterator[Step]:
        """Servers that take over as much as they can, and give up what others own as well."""
        free = self.room - self.held.sum(axis=1)
        for server in sorted(range(len(self.rows)), key=lambda server: -free[self.rows[server]].sum()):
            after = self._next(server)
            if (after & ~self.held[self.rows[server]]).any():
                yield self._step(server, after)

    def givers(self) -> Iterator[Step]:
        for server, rows in enumerate(self.rows):
            after = self._next(server)
            if (after != self.held[rows]).any():
                yield self._step(server, after)

    def park(self) -> Iterator[Step]:
        """A third device takes what a full one can then give up for what it is to have.

        All that is held and not wanted has one owner now, and who wants more is full.
        """
        held = self.held
        full = int(np.flatnonzero((self.target & ~held).any(axis=1))[0])
        expert = int(np.flatnonzero(held[full] & ~self.target[full])[0])
        copies = held.sum(axis=0) > 1
        for third in np.argsort(held.sum(axis=1) - self.room, kind="stable"):
            spare = np.flatnonzero(held[third] & copies)
            if third == full or not (held[third].sum() < self.room[third] or len(spare)):
                continue
            if held[third].sum() == self.room[third]:
                held[third, spare[0]] = False
            held[third, expert] = True
            yield self._step_of(int(third))
            held[full, expert], held[full, np.flatnonzero(self.target[full] & ~held[full])[0]] = False, True
            yield self._step_of(full)
            return
        raise InvalidPlan("no server has a slot free or a copy too many: give more --slots, or add a server")

    def _next(self, server: int) -> Booleans:
        """[devices of it, experts]: what it can hold next."""
        rows = self.rows[server]
        mine, wanted = self.held[rows], self.target[rows]
        copies = self.held.sum(axis=0)
        if not (mine.any(axis=0) & ~wanted.any(axis=0) & (copies == mine.sum(axis=0))).any():
            # Nobody misses what it gives up.
            return wanted.copy()
        after = mine.copy()
        for device, room in enumerate(self.room[rows]):
            after[device] &= wanted[device] | (copies < 2)
            new = np.flatnonzero(wanted[device] & ~after[device])
            after[device, new[: room - after[device].sum()]] = True
            copies = copies + after[device] - mine[device]
        return after

    def _step(self, server: int, after: Booleans) -> Step:
        self.held[self.rows[server]] = after
        return server, after

    def _step_of(self, device: int) -> Step:
        server = next(server for server, rows in enumerate(self.rows) if device < rows.stop)
        return server, self.held[self.rows[server]].copy()
