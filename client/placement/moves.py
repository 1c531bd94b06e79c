"""Better placements a few moves away from the present one: pure functions over numpy arrays.

A move is an expert that a server must read. Peak is the largest load of a server over the mean: 1 is perfect. As in
`assignment`, the copies of an expert share its load equally.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.exchanges import exchange, has_room
from expertd.client.placement.packing import Booleans, Floats, Integers, bin_loads, even_out, pack_once

EVEN = 1.01
"""Peak at which nothing more is moved."""
WORTH = 0.002
"""By how much each move must lower the peak."""
STEPS = 500


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """Placements of one layer, each some moves further from the present one and more even."""

    held: tuple[Booleans, ...]
    """[servers, experts] each; the first one is the present one, or what must become of it."""
    moves: tuple[int, ...]
    peaks: tuple[float, ...]

    def best_after(self, place: int) -> tuple[float, int]:
        """By how much the peak falls for each move up to a later place, and the place where it is most."""
        slopes = [
            (self.peaks[place] - self.peaks[later]) / max(self.moves[later] - self.moves[place], 1e-3)
            for later in range(place + 1, len(self.held))
        ]
        if not slopes:
            return 0.0, place
        best = int(np.argmax(slopes))
        return slopes[best], place + 1 + best


def replan(heat: Floats, present: Booleans, slots: Integers, most_moves: int | None = None) -> Booleans:
    """[layers, servers, experts]: placements that few moves make of `present` [layers, servers, experts].

    `heat` is [layers, experts], `slots` [layers, servers]. Experts that nobody owns, and those of servers with fewer
    slots than experts, are placed whatever it takes; else each of at most `most_moves` moves lowers its layer's peak by
    `WORTH` or more. Raises `InvalidPlan` where experts have no room.
    """
    paths = [walk(*layer) for layer in zip(heat, present, slots, strict=True)]
    places = choose(paths, most_moves)
    return np.array([path.held[place] for path, place in zip(paths, places, strict=True)], np.bool_)


def choose(paths: Sequence[Path], most_moves: int | None = None) -> list[int]:
    """How far to go on each path: first where moves buy most, until none is worth it or too many are made."""
    places = [0] * len(paths)
    left = np.inf if most_moves is None else most_moves - sum(path.moves[0] for path in paths)
    queue = [(-path.best_after(0)[0], layer) for layer, path in enumerate(paths)]
    heapq.heapify(queue)
    while queue:
        layer = heapq.heappop(queue)[1]
        path, place = paths[layer], places[layer]
        gain, further = path.best_after(place)
        cost = path.moves[further] - path.moves[place]
        if gain < WORTH or cost > left:
            continue
        places[layer], left = further, left - cost
        heapq.heappush(queue, (-path.best_after(further)[0], layer))
    return places


def walk(heat: Floats, present: Booleans, slots: Integers) -> Path:
    """From `present` [servers, experts] of one layer with `heat` [experts], one improvement after another."""
    if slots.sum() < len(heat):
        raise InvalidPlan(
            f"the fleet has {slots.sum()} slots for {len(heat)} experts; add servers, or give more --slots"
        )
    total = heat.sum()
    load = heat / total * max(np.count_nonzero(slots), 1) if total > 0 else np.zeros(len(heat))
    steps = [settle(load, present, slots)]
    while len(steps) < STEPS and _peak(load, steps[-1]) > EVEN:
        after = exchange(load, steps[-1], slots)
        if after is None:
            break
        steps.append(after)
    if _peak(load, steps[-1]) > EVEN and has_room(present, slots):
        steps.append(anew(load, present, slots))
    moves = tuple(int((held & ~present).sum()) for held in steps)
    return Path(tuple(steps), moves, tuple(_peak(load, held) for held in steps))


def anew(load: Floats, present: Booleans, slots: Integers) -> Booleans:
    """[servers, experts]: an even placement whatever it takes, each part of it for a server that has much of it."""
    able = np.flatnonzero(slots)
    parts = even_out(load[:, None], pack_once(load[:, None], slots[able]), slots[able])
    held = np.zeros_like(present)
    common = (parts.astype(np.int64) @ present[able].T).astype(np.float64)
    common[slots[able][:, None] != slots[able]] = -1
    for _ in able:
        part, server = np.unravel_index(int(common.argmax()), common.shape)
        held[able[server]] = parts[part]
        common[part], common[:, server] = -2, -2
    return held


def loads_of(load: Floats, held: Booleans) -> Floats:
    """[servers]: what each has of `load` [experts], but for experts that nobody owns."""
    owned = held.any(axis=0)
    filled: Floats = bin_loads(load[owned, None], held[:, owned])[:, 0]
    return filled


def settle(load: Floats, present: Booleans, slots: Integers) -> Booleans:
    """[servers, experts]: `present` without what servers have no slots for, and with what nobody owns."""
    held = present.copy()
    for server in np.flatnonzero(held.sum(axis=1) > slots):
        mine = np.flatnonzero(held[server])
        # What others own as well goes first, then what is least asked for.
        order = np.lexsort((load[mine], held[:, mine].sum(axis=0) == 1))
        held[server, mine[order[: len(mine) - slots[server]]]] = False
    lost = np.flatnonzero(~held.any(axis=0))
    for expert in lost[np.argsort(-load[lost], kind="stable")]:
        _take_in(int(expert), load, held, slots)
    return held


def _take_in(expert: int, load: Floats, held: Booleans, slots: Integers) -> None:
    """Have the least loaded server own it that has a free slot, or else one that gives up the copy of another."""
    filled = loads_of(load, held)
    free = np.flatnonzero(held.sum(axis=1) < slots)
    if len(free):
        held[free[filled[free].argmin()], expert] = True
        return
    spare = held & (held.sum(axis=0) > 1) & (slots > 0)[:, None]
    # As many slots as experts, all taken, and one expert lost: another has copies.
    server = min(np.flatnonzero(spare.any(axis=1)), key=lambda one: filled[one])
    copies = np.flatnonzero(spare[server])
    held[server, copies[load[copies].argmin()]], held[server, expert] = False, True


def _peak(load: Floats, held: Booleans) -> float:
    """A mean server has a load of 1; nobody has any where nothing was asked for."""
    return float(loads_of(load, held).max()) if load.any() else 1.0
