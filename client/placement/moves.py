"""Better placements a few moves away from the present one: pure functions over numpy arrays.

A move is an expert that a device must read. Peak is the largest load of a device over the mean: 1 is perfect. The
copies of an expert share its load as `shares` says; a server is a device, or several.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.exchanges import State, exchange, has_room, shares
from expertd.client.placement.packing import Booleans, Floats, Integers, even_out, pack_once

EVEN = 1.01
"""Peak at which nothing more is moved."""
WORTH = 0.002
"""By how much each move must lower the peak."""
STEPS = 500


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """Placements of one layer, each some moves further from the present one and more even."""

    held: tuple[Booleans, ...]
    """[devices, experts] each; the first one is the present one, or what must become of it."""
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


def replan(
    heat: Floats,
    present: Booleans,
    slots: Integers,
    most_moves: int | None = None,
    devices: Integers | None = None,
) -> Booleans:
    """[layers, devices, experts]: placements that few moves make of `present` [layers, devices, experts].

    `heat` is [layers, experts], `slots` [layers, devices]; `devices` [servers] is how many each server has (None: one).
    Experts that nobody owns, and those of devices with fewer slots than experts, are placed whatever it takes; else
    each of at most `most_moves` moves lowers its layer's peak by `WORTH` or more. Raises `InvalidPlan` where experts
    have no room.
    """
    paths = [walk(*layer, devices) for layer in zip(heat, present, slots, strict=True)]
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


def walk(heat: Floats, present: Booleans, slots: Integers, devices: Integers | None = None) -> Path:
    """From `present` [devices, experts] of one layer with `heat` [experts], one improvement after another."""
    if slots.sum() < len(heat):
        raise InvalidPlan(
            f"the fleet has {slots.sum()} slots for {len(heat)} experts; add servers, or give more --slots"
        )
    total = heat.sum()
    load = heat / total * max(np.count_nonzero(slots), 1) if total > 0 else np.zeros(len(heat))

    def peak(held: Booleans) -> float:
        """A mean device has a load of 1; nobody has any where nothing was asked for."""
        return float(loads_of(load, held, devices).max()) if load.any() else 1.0

    steps = [settle(load, present, slots, devices)]
    while len(steps) < STEPS and peak(steps[-1]) > EVEN:
        after = exchange(State(load, steps[-1], slots, devices))
        if after is None:
            break
        steps.append(after)
    if peak(steps[-1]) > EVEN and has_room(present, slots):
        steps.append(anew(load, present, slots))
    moves = tuple(int((held & ~present).sum()) for held in steps)
    return Path(tuple(steps), moves, tuple(map(peak, steps)))


def anew(load: Floats, present: Booleans, slots: Integers) -> Booleans:
    """[devices, experts]: an even placement whatever it takes, each part of it for a device that has much of it."""
    able = np.flatnonzero(slots)
    parts = even_out(load[:, None], pack_once(load[:, None], slots[able]), slots[able])
    held = np.zeros_like(present)
    common = (parts.astype(np.int64) @ present[able].T).astype(np.float64)
    common[slots[able][:, None] != slots[able]] = -1
    for _ in able:
        part, device = np.unravel_index(int(common.argmax()), common.shape)
        held[able[device]] = parts[part]
        common[part], common[:, device] = -2, -2
    return held


def loads_of(load: Floats, held: Booleans, devices: Integers | None = None) -> Floats:
    """[devices]: what each has of `load` [experts], but for experts that nobody owns."""
    filled: Floats = shares(load, held.T, devices).sum(axis=0)
    return filled


def settle(load: Floats, present: Booleans, slots: Integers, devices: Integers | None) -> Booleans:
    """[devices, experts]: `present` without what devices have no slots for, and with what nobody owns."""
    held = present.copy()
    for device in np.flatnonzero(held.sum(axis=1) > slots):
        mine = np.flatnonzero(held[device])
        # What others own as well goes first, then what is least asked for.
        order = np.lexsort((load[mine], held[:, mine].sum(axis=0) == 1))
        held[device, mine[order[: len(mine) - slots[device]]]] = False
    lost = np.flatnonzero(~held.any(axis=0))
    for expert in lost[np.argsort(-load[lost], kind="stable")]:
        _take_in(int(expert), load, held, slots, devices)
    return held


def _take_in(expert: int, load: Floats, held: Booleans, slots: Integers, devices: Integers | None) -> None:
    """Have the least loaded device own it that has a free slot, or else one that gives up the copy of another."""
    filled = loads_of(load, held, devices)
    free = np.flatnonzero(held.sum(axis=1) < slots)
    if len(free):
        held[free[filled[free].argmin()], expert] = True
        return
    spare = held & (held.sum(axis=0) > 1) & (slots > 0)[:, None]
    # As many slots as experts, all taken, and one expert lost: another has copies.
    device = min(np.flatnonzero(spare.any(axis=1)), key=lambda one: filled[one])
    copies = np.flatnonzero(spare[device])
    held[device, copies[load[copies].argmin()]], held[device, expert] = False, True
