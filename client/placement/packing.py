"""How many copies every expert gets, and which bin takes each: balanced packing over several layers at once.

The idea is that of DeepSeek's EPLB, https://github.com/deepseek-ai/EPLB: give redundant copies to what is most loaded
for each of its copies, pack the heaviest first into the least loaded bin. New here: bins of different sizes, no item
twice in one bin, one packing for many layers, and swaps that even out what the greedy steps leave.
"""

from __future__ import annotations

import heapq
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Booleans: TypeAlias = NDArray[np.bool_]

POWER = 8.0
"""Unevenness of bins is the sum of load^POWER over bins and layers: smooth, and all but ruled by the largest."""
SWAP_PARTNERS = 32
SWAP_STEPS = 300
EVEN_ENOUGH = 1.0001
"""Largest load over the mean at which nothing more is tried."""
ATTEMPTS = 32
ATTEMPTS_SIZE = 2_000_000
"""Attempts times bins times loads: what is spent on looking for luck, about a second."""
GUESS_ERROR = 0.1


def count_copies(loads: Floats, slots: int, most: int) -> Integers:
    """[items] copies, each 1 to `most`, at most `slots` in all, so that the largest load of one copy is least.

    `loads` is [items, layers] with layers of equal weight; an item of several layers counts by its POWER norm.
    """
    weight = np.linalg.norm(loads, POWER, axis=1)
    copies = np.ones(len(loads), np.int64)
    # The tie toward fewer copies, then the lower id, makes the result a function of the loads alone.
    heap = [(-weight[item], 1, item) for item in range(len(loads))] if most > 1 else []
    heapq.heapify(heap)
    for _ in range(slots - len(loads)):
        if not heap:
            break
        _, count, item = heapq.heappop(heap)
        copies[item] = count + 1
        if count + 1 < most:
            heapq.heappush(heap, (-weight[item] / (count + 1), count + 1, item))
    return copies


def pack_evenly(loads: Floats, slots: Integers) -> Booleans:
    """[bins, items]: which bin holds a copy of which item; every item in at least one, none twice in one.

    `loads` is [items, layers], of any unit; `slots` is [bins], together at least one for every item. Starts from
    several slightly wrong loads, since greedy steps are a matter of luck, and keeps the most even packing.
    """
    loads = _alike(loads, len(slots))
    random = np.random.default_rng(0)
    best, least = np.zeros((0, 0), np.bool_), np.inf
    for attempt in range(int(np.clip(ATTEMPTS_SIZE // (len(slots) * loads.size), 1, ATTEMPTS))):
        guess, copies = loads, int(slots.sum())
        if attempt:
            guess = loads * np.exp(random.normal(0, GUESS_ERROR, (len(loads), 1)))
            # An empty slot beside a heavy copy is at times worth more than one copy more.
            copies -= int(random.integers(0, 1 + (copies - len(loads)) // 2))
        held = even_out(loads, _pack_guess(loads, guess, copies, slots), slots)
        peak = float(bin_loads(loads, held).max(axis=0).sum())
        if peak < least - 1e-9:
            best, least = held, peak
        if least < EVEN_ENOUGH * loads.shape[1]:
            break
    return best


def pack_once(loads: Floats, slots: Integers) -> Booleans:
    """[bins, items] as from `pack_evenly`, by the greedy steps alone."""
    loads = _alike(loads, len(slots))
    return _pack_guess(loads, loads, int(slots.sum()), slots)


def _alike(loads: Floats, bins: int) -> Floats:
    """Loads with the same total for every layer: a mean of 1 for every bin."""
    total = loads.sum(axis=0)
    alike: Floats = np.where(total > 0, loads / np.where(total > 0, total, 1), 1 / len(loads)) * bins
    return alike


def _pack_guess(loads: Floats, guess: Floats, copies: int, slots: Integers) -> Booleans:
    """Pack `copies` copies, with numbers and order taken from the guessed loads."""
    counts = count_copies(guess, copies, len(slots))
    order = np.argsort(-np.linalg.norm(guess / counts[:, None], POWER, axis=1), kind="stable")
    return pack(loads, counts, slots, order)


def bin_loads(loads: Floats, held: Booleans) -> Floats:
    """[bins, layers]: the load of every bin when the copies of an item share its load equally."""
    shared: Floats = held @ (loads / held.sum(axis=0)[:, None])
    return shared


def pack(loads: Floats, copies: Integers, slots: Integers, order: Integers) -> Booleans:
    """[bins, items]: items in `order`, all copies of one at a time, go to the least loaded bins with room.

    Where distinct bins with room run out, an item gets fewer copies than asked for, never none.
    """
    held = np.zeros((len(slots), len(loads)), np.bool_)
    free = slots.copy()
    filled = np.zeros((len(slots), loads.shape[1]))
    each = loads / copies[:, None]
    for placed, item in enumerate(order):
        growth = ((filled + each[item]) ** POWER - filled**POWER).sum(axis=1)
        if free.sum() == copies[order[placed:]].sum():
            # A bin with a slot for every item that is left takes all of them, or a slot would stay empty.
            growth[free >= len(order) - placed] = -1
        growth[free == 0] = np.inf
        room = min(int(copies[item]), int(np.count_nonzero(free)))
        # Equal bins: the one with most room first, then in order, which keeps copies of a group side by side.
        chosen = np.lexsort((-free, growth))[:room]
        held[chosen, item] = True
        free[chosen] -= 1
        filled[chosen] += loads[item] / room
    return held


def even_out(loads: Floats, held: Booleans, slots: Integers) -> Booleans:
    """Swap copies between the most loaded bin of each layer and little loaded ones while that lowers unevenness."""
    held = held.copy()
    each = loads / held.sum(axis=0)[:, None]
    filled = bin_loads(loads, held)
    enough = EVEN_ENOUGH * float(filled.mean(axis=0).sum())
    for _ in range(SWAP_STEPS):
        if filled.max(axis=0).sum() < enough:
            break
        if not any(_improve(int(full), each, held, filled, slots) for full in np.unique(filled.argmax(axis=0))):
            break
    return held


def _improve(full: int, each: Floats, held: Booleans, filled: Floats, slots: Integers) -> bool:
    """Make the best swap between bin `full` and one of the least loaded; False when none lowers unevenness."""
    least = np.argsort((filled**POWER).sum(axis=1), kind="stable")[:SWAP_PARTNERS]
    best_gain, best = 1e-9 * float((filled[full] ** POWER).sum()), None
    for other in least[least != full]:
        gives = np.flatnonzero(held[full] & ~held[other])
        takes = np.flatnonzero(held[other] & ~held[full])
        taken = each[takes]
        if held[other].sum() < slots[other]:
            takes, taken = np.append(takes, -1), np.append(taken, np.zeros((1, each.shape[1])), axis=0)
        if not (len(gives) and len(takes)):
            continue
        moved = each[gives][:, None] - taken[None]
        after = ((filled[full] - moved).clip(0) ** POWER + (filled[other] + moved).clip(0) ** POWER).sum(axis=2)
        gain = float((filled[full] ** POWER + filled[other] ** POWER).sum() - after.min())
        if gain > best_gain:
            give, take = np.unravel_index(int(after.argmin()), after.shape)
            best_gain, best = gain, (int(other), int(gives[int(give)]), int(takes[int(take)]), moved[give, take])
    if best is None:
        return False
    partner, gift, taken_item, change = best
    held[full, gift], held[partner, gift] = False, True
    if taken_item >= 0:
        held[full, taken_item], held[partner, taken_item] = True, False
    filled[full] -= change
    filled[partner] += change
    return True
