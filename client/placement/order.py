"""In which order servers take over and give up experts: pure functions that never leave one without an owner."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.packing import Booleans, Integers

Step = tuple[int, Booleans]
"""A server, and all that it holds from then on: [experts]."""


def order(present: Booleans, target: Booleans, slots: Integers) -> Iterator[Step]:
    """From `present` to `target` [servers, experts] of one layer, one server after another.

    Whoever takes over does so before others give up. At every instant each expert that has an owner in `present` has
    one, and no server holds more than `slots` [servers], or than at present. Where a few must change places and
    nobody has room, experts are parked on a third server meanwhile. Raises `InvalidPlan` where nobody has a slot free
    or a copy too many.
    """
    held, room = present.copy(), np.maximum(slots, present.sum(axis=1))
    while (held != target).any():
        steps = list(_takers(held, target, room)) or list(_givers(held, target, room))
        yield from steps or _park(held, target, room)


def _takers(held: Booleans, target: Booleans, room: Integers) -> Iterator[Step]:
    """Servers that take over as much as they can, and give up what others own as well; `held` follows."""
    for server in np.argsort(held.sum(axis=1) - room, kind="stable"):
        after = _next(int(server), held, target, room)
        if (after & ~held[server]).any():
            held[server] = after
            yield int(server), after


def _givers(held: Booleans, target: Booleans, room: Integers) -> Iterator[Step]:
    for server in range(len(held)):
        after = _next(server, held, target, room)
        if (after != held[server]).any():
            held[server] = after
            yield server, after


def _next(server: int, held: Booleans, target: Booleans, room: Integers) -> Booleans:
    """[experts]: what it can hold next."""
    mine = held[server]
    after: Booleans = mine & ~(mine & ~target[server] & (held.sum(axis=0) > 1))
    wanted = np.flatnonzero(target[server] & ~mine)
    after[wanted[: room[server] - after.sum()]] = True
    return after


def _park(held: Booleans, target: Booleans, room: Integers) -> Iterator[Step]:
    """A third server takes what a full one can then give up for what it is to have; `held` follows.

    All that is held and not wanted has one owner now, and who wants more is full.
    """
    full = int(np.flatnonzero((target & ~held).any(axis=1))[0])
    expert = int(np.flatnonzero(held[full] & ~target[full])[0])
    copies = held.sum(axis=0) > 1
    for third in np.argsort(held.sum(axis=1) - room, kind="stable"):
        spare = np.flatnonzero(held[third] & copies)
        if third == full or not (held[third].sum() < room[third] or len(spare)):
            continue
        if held[third].sum() == room[third]:
            held[third, spare[0]] = False
        held[third, expert] = True
        yield int(third), held[third].copy()
        held[full] = _next(full, held, target, room)
        yield full, held[full].copy()
        return
    raise InvalidPlan("no server has a slot free or a copy too many: give more --slots, or add a server")
