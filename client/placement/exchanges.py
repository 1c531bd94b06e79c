"""The exchange between the most loaded server and another that evens out most for each expert that must be read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expertd.client.placement.packing import POWER, Booleans, Floats, Integers

PARTNERS = 16
"""Little loaded servers that the most loaded one deals with."""
LEAST = 1e-6
"""Of the unevenness: what an exchange must take away."""


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """Alike changes, one for each of some experts."""

    experts: Integers
    """[n]"""
    change: Floats
    """[n, servers]: of their loads."""
    cells: tuple[tuple[int, bool], ...] = ()
    """Servers that begin or cease to hold the expert."""
    moves: float = 0

    def apply(self, index: int, held: Booleans) -> None:
        for server, holds in self.cells:
            held[server, self.experts[index]] = holds


def exchange(load: Floats, held: Booleans, slots: Integers) -> Booleans | None:
    """`held` [servers, experts] after it, for `load` [experts]; None where none is even worth a look.

    Unevenness is the sum of load^POWER over the servers. With a free slot, or a copy too many somewhere, whatever is
    found can be done without leaving an expert without owner.
    """
    filled = held @ (load / held.sum(axis=0))
    full = int(filled.argmax())
    before = float((filled**POWER).sum())
    others = [server for server in np.argsort(filled, kind="stable") if server != full and slots[server]]
    pairs = [_alone(load, held, full)]
    for other in others[:PARTNERS]:
        pairs += _between(load, held, slots, full, int(other))
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
    result = held.copy()
    first.apply(int(one), result)
    second.apply(int(two), result)
    return result


def _alone(load: Floats, held: Booleans, full: int) -> tuple[Options, Options]:
    """The full server gives up one of several copies; that is no move, but better kept than done for nothing."""
    return _drops(load, held, full, moves=0.5), _nothing(held)


def _between(load: Floats, held: Booleans, slots: Integers, full: int, other: int) -> list[tuple[Options, Options]]:
    gives = np.flatnonzero(held[full] & ~held[other])
    takes = np.flatnonzero(held[other] & ~held[full])
    is_free = bool(held[other].sum() < slots[other])
    rooms = [_drops(load, held, other), *([_nothing(held)] if is_free else [])]
    given = [_moves(load, held, gives, full, other), _copies(load, held, gives, other)]
    # Without a free slot somebody must hold something that it would not keep.
    taken = _moves(load, held, takes, other, full, moves=1 if is_free else 2)
    return [*((one, room) for one in given for room in rooms), *([(given[0], taken)] if has_room(held, slots) else [])]


def has_room(held: Booleans, slots: Integers) -> bool:
    """Whether there are more slots than experts."""
    return bool(slots.sum() > held.shape[1])


def _nothing(held: Booleans) -> Options:
    return Options(np.zeros(1, np.int64), np.zeros((1, len(held))))


def _moves(load: Floats, held: Booleans, experts: Integers, source: int, target: int, moves: float = 1) -> Options:
    """Servers that own them as well keep their shares."""
    share = load[experts] / held[:, experts].sum(axis=0)
    change = np.zeros((len(experts), len(held)))
    change[:, source], change[:, target] = -share, share
    return Options(experts, change, ((source, False), (target, True)), moves)


def _copies(load: Floats, held: Booleans, experts: Integers, target: int) -> Options:
    """All owners share their load with the new one."""
    copies = held[:, experts].sum(axis=0)
    change = np.where(held[:, experts].T, (load[experts] / (copies + 1) - load[experts] / copies)[:, None], 0.0)
    change[:, target] = load[experts] / (copies + 1)
    return Options(experts, change, ((target, True),), 1)


def _drops(load: Floats, held: Booleans, source: int, moves: float = 0) -> Options:
    """Experts of which there are other copies, whose owners take over its share."""
    experts = np.flatnonzero(held[source] & (held.sum(axis=0) > 1))
    copies = held[:, experts].sum(axis=0)
    change = np.where(held[:, experts].T, (load[experts] / (copies - 1) - load[experts] / copies)[:, None], 0.0)
    change[:, source] = -load[experts] / copies
    return Options(experts, change, ((source, False),), moves)
