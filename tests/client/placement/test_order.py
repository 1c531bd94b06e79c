"""The order of updates: for any two placements, no expert is without an owner and no server overfull on the way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.order import order, rows_of
from expertd.client.placement.packing import Booleans, Integers

Change = tuple[Booleans, Booleans, Integers, Integers]


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Two placements that fit the same slots, at times with one to spare for all, and a device that is to leave; and
    how many devices each server has."""
    devices = np.array(draw(st.lists(st.integers(1, 3), min_size=2, max_size=4)))
    count, experts = int(devices.sum()), draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    slots = random.integers(1, 4, count)
    slots[0] += max(0, experts + draw(st.integers(1, 3)) - slots.sum())

    def placement(slots: Integers) -> Booleans:
        held = np.zeros((count, experts), np.bool_)
        places = random.permutation(np.repeat(np.arange(count), slots))
        for place, expert in zip(places, random.permutation(experts), strict=False):
            held[place, expert] = True
        for place in places[experts:]:
            if draw(st.booleans()):
                held[place, random.integers(experts)] = True
        return held

    present, target = placement(slots), placement(slots)
    if draw(st.booleans()) and slots[1:].sum() > experts:
        slots[0], target = 0, placement(np.concatenate(([0], slots[1:])))
    return present, target, slots, devices


@settings(max_examples=500, deadline=None)
@given(changes())
def test_every_expert_keeps_an_owner_and_no_device_is_overfull(change: Change) -> None:
    present, target, slots, devices = change
    held, room, rows = present.copy(), np.maximum(slots, present.sum(axis=1)), rows_of(devices)
    for number, (server, after) in enumerate(order(present, target, slots, devices)):
        assert (after != held[rows[server]]).any()
        held[rows[server]] = after
        assert held.any(axis=0).all()
        assert (held.sum(axis=1) <= room).all()
        assert number < 4 * held.size
    assert (held == target).all()


def test_full_devices_of_a_server_change_places_at_once() -> None:
    present = np.array([[True, False, False], [False, True, False], [False, False, True]])
    ((server, after),) = order(present, present[[1, 0, 2]], np.ones(3, np.int64), np.array([2, 1]))
    assert server == 0
    assert after.tolist() == [[False, True, False], [True, False, False]]


def test_who_takes_over_comes_before_who_gives_up() -> None:
    present = np.array([[True, True, False], [False, False, True]])
    target = np.array([[True, False, False], [False, True, True]])
    steps = [(server, np.flatnonzero(after[0]).tolist()) for server, after in order(present, target, np.array([2, 2]))]
    assert steps == [(1, [1, 2]), (0, [0])]


def test_nobody_is_updated_twice_for_what_can_be_done_at_once() -> None:
    present = np.array([[True, True, True], [True, False, False]])
    target = np.array([[False, False, True], [True, True, False]])
    steps = [(server, np.flatnonzero(after[0]).tolist()) for server, after in order(present, target, np.array([3, 3]))]
    assert steps == [(1, [0, 1]), (0, [2])]


def test_a_third_server_holds_what_changes_places() -> None:
    present = np.array([[True, False, False], [False, True, False], [False, False, True]])
    target = np.array([[False, True, False], [True, False, False], [False, False, True]])
    steps = [
        (server, np.flatnonzero(after[0]).tolist()) for server, after in order(present, target, np.array([1, 1, 2]))
    ]
    assert steps == [(2, [0, 2]), (0, [1]), (1, [0]), (2, [2])]
    with pytest.raises(InvalidPlan, match="no server has a slot free or a copy too many"):
        list(order(present, target, np.array([1, 1, 1])))
