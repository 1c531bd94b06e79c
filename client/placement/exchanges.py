"""The exchange between the most loaded device and another that evens out most for each expert that must be read.

A third device may make room for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from expertd.client.placement.packing import POWER, Booleans, Floats, Integers

PARTNERS = 16
"""Little loaded devices that the most loaded one deals with."""
LEAST = 1e-6
"""Of the unevenness: what an exchange must take away."""


def shares(load: Floats, held: Booleans, devices: Integers | None = None) -> Floats:
    """[experts, devices]: of `load` [experts], whose copies are `held` [experts, devices].

    Servers that have an expert share its load equally, and so do the devices of each that have it. `devices` [servers]
    is how many each has, in their order; None: one.
    """
    if devices is None or len(devices) == held.shape[1]:
        return np.where(held, (load / np.maximum(held.sum(axis=1), 1))[:, None], 0.0)
    copies = np.add.reduceat(held, np.cumsum(devices) - devices, axis=1, dtype=np.int64)
    owners = np.maximum(np.count_nonzero(copies, axis=1), 1)
    each = (load / owners)[:, None] / np.maximum(copies, 1)
    return np.where(held, np.repeat(each, devices, axis=1), 0.0)


@dataclass(frozen=True, eq=False)
class State:
    """A layer of which something may be exchanged."""

    load: Floats
    """[experts]"""
    held: Booleans
    """[devices, experts]"""
    slots: Integers
    """[devices]"""
    devices: Integers | None = None
    """[servers], as of `shares`."""

    @cached_property
    def shares(self) -> Floats:
        """[experts, devices]"""
        return shares(self.load, self.held.T, self.devices)


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """Alike changes, one for each of some experts."""

    experts: Integers
    """[n]"""
    change: Floats
    """[n, devices]: of their loads."""
    cells: tuple[tuple[int, bool], ...] = ()
    """Devices that begin or cease to hold the expert."""
    moves: float = 0
    dropped: tuple[int, int] | None = None
    """A device and an expert of which it gives up a copy, whichever option is taken."""

    def apply(self, index: int, held: Booleans) -> None:
        for device, holds in self.cells:
            held[device, self.experts[index]] = holds
        if self.dropped is not None:
            held[self.dropped] = False


def exchange(state: State) -> Booleans | None:
    """`held` [devices, experts] after it; None where none is even worth a look.

    Unevenness is the sum of load^POWER over the devices. With a free slot, or a copy too many somewhere, whatever is
    found can be done without leaving an expert without owner.
    """
    filled = state.shares.sum(axis=0)
    full = int(filled.argmax())
    before = float((filled**POWER).sum())
    others = [device for device in np.argsort(filled, kind="stable") if device != full and state.slots[device]]
    pairs = [_alone(state, full)]
    for other in others[:PARTNERS]:
        pairs += _between(state, full, int(other))
    best, most = None, LEAST * before
    for first, second in pairs:
        if not (len(first.experts) and len(second.experts)):
            continue
        after = ((filled + first.change[:, None] + second.change[None]).clip(0) ** POWER).sum(axis=2)
        gain = (before - float(after.min())) / (first.moves + second.moves)
        if gain > most:
            most, best = gain, (first, second, np.unravel_index(int(after.argmin()), after.shape))
    if best is None:
        return None
    first, second, (one, two) = best
    result = state.held.copy()
    first.apply(int(one), result)
    second.apply(int(two), result)
    return result


def has_room(held: Booleans, slots: Integers) -> bool:
    """Whether there are more slots than experts."""
    return bool(slots.sum() > held.shape[1])


def _alone(state: State, full: int) -> tuple[Options, Options]:
    """The full device gives up one of several copies; that is no move, but better kept than done for nothing."""
    return _drops(state, full, moves=0.5), _nothing(state)


def _between(state: State, full: int, other: int) -> list[tuple[Options, Options]]:
    held = state.held
    gives, takes = np.flatnonzero(held[full] & ~held[other]), np.flatnonzero(held[other] & ~held[full])
    is_free = bool(held[other].sum() < state.slots[other])
    rooms = [_drops(state, other), *([_nothing(state)] if is_free else _passes(state, full, other))]
    given = [_moves(state, gives, full, other), _options(state, gives, ((other, True),), 1)]
    # Without a free slot somebody must hold something that it would not keep.
    taken = _moves(state, takes, other, full, moves=1 if is_free else 2)
    return [
        *((one, room) for one in given for room in rooms),
        *([(given[0], taken)] if has_room(held, state.slots) else []),
    ]


def _nothing(state: State) -> Options:
    return Options(np.zeros(1, np.int64), np.zeros((1, len(state.held))))


def _moves(state: State, experts: Integers, source: int, target: int, moves: float = 1) -> Options:
    return _options(state, experts, ((source, False), (target, True)), moves)


def _drops(state: State, source: int, moves: float = 0) -> Options:
    """Experts of which there are other copies."""
    experts = np.flatnonzero(state.held[source] & (state.held.sum(axis=0) > 1))
    return _options(state, experts, ((source, False),), moves)


def _passes(state: State, full: int, other: int) -> list[Options]:
    """Experts that `other` could pass on to a third device, which gives up the copy that is least asked for.

    It is none that the full device has, of which an option would change the copies twice.
    """
    copies = state.held & (state.held.sum(axis=0) > 1) & ~state.held[full]
    copies[[full, other]] = False
    experts = np.flatnonzero(copies.any(axis=0))
    if not len(experts):
        return []
    least = int(experts[state.load[experts].argmin()])
    third = min(np.flatnonzero(copies[:, least]).tolist(), key=lambda device: float(state.shares[:, device].sum()))
    dropped = _options(state, np.array([least]), ((third, False),), 0).change
    passed = _moves(state, np.flatnonzero(state.held[other] & ~state.held[third]), other, third)
    return [Options(passed.experts, passed.change + dropped, passed.cells, 1, (third, least))]


def _options(state: State, experts: Integers, cells: tuple[tuple[int, bool], ...], moves: float) -> Options:
    after = state.held.T[experts]
    for device, holds in cells:
        after[:, device] = holds
    return Options(experts, shares(state.load[experts], after, state.devices) - state.shares[experts], cells, moves)
