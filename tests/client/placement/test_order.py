"""The order of updates: for any two placements, no expert is without an owner and no server overfull on the way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.order import order
from expertd.client.placement.packing import Booleans, Integers


@st.composite
def changes(draw: st.DrawFn) -> tuple[Booleans, Booleans, Integers]:
    """Two placements that fit the same slots, at times with one to spare for all, and a server that is to leave."""
    servers, experts = draw(st.integers(2, 5)), draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    slots = random.integers(1, 4, servers)
    slots[0] += max(0, experts + draw(st.integers(1, 3)) - slots.sum())

    def placement(slots: Integers) -> Booleans:
        held = np.zeros((servers, experts), np.bool_)
        places = random.permutation(np.repeat(np.arange(servers), slots))
        for place, expert in zip(places, random.permutation(experts), strict=False):
            held[place, expert] = True
        for place in places[experts:]:
            if draw(st.booleans()):
                held[place, random.integers(experts)] = True
        return held

    present, target = placement(slots), placement(slots)
    if draw(st.booleans()) and slots[1:].sum() > experts:
        slots[0], target = 0, placement(np.concatenate(([0], slots[1:])))
    return present, target, slots


@settings(max_examples=300, deadline=None)
@given(changes())
def test_every_expert_keeps_an_owner_and_no_server_is_overfull(change: tuple[Booleans, Booleans, Integers]) -> None:
    present, target, slots = change
    held, room = present.copy(), np.maximum(slots, present.sum(axis=1))
    for number, (server, after) in enumerate(order(present, target, slots)):
        assert (after != held[server]).any()
        held[server] = after
        assert held.any(axis=0).all()
        assert (held.sum(axis=1) <= room).all()
        assert number < 4 * held.size
    assert (held == target).all()


def test_who_takes_over_comes_before_who_gives_up() -> None:
    present = np.array([[True, True, False], [False, False, True]])
    target = np.array([[True, False, False], [False, True, True]])
    steps = [(server, np.flatnonzero(after).tolist()) for server, after in order(present, target, np.array([2, 2]))]
    assert steps == [(1, [1, 2]), (0, [0])]


def test_nobody_is_updated_twice_for_what_can_be_done_at_once() -> None:
    present = np.array([[True, True, True], [True, False, False]])
    target = np.array([[False, False, True], [True, True, False]])
    steps = [(server, np.flatnonzero(after).tolist()) for server, after in order(present, target, np.array([3, 3]))]
    assert steps == [(1, [0, 1]), (0, [2])]


def test_a_third_server_holds_what_changes_places() -> None:
    present = np.array([[True, False, False], [False, True, False], [False, False, True]])
    target = np.array([[False, True, False], [True, False, False], [False, False, True]])
    steps = [(server, np.flatnonzero(after).tolist()) for server, after in order(present, target, np.array([1, 1, 2]))]
    assert steps == [(2, [0, 2]), (0, [1]), (1, [0]), (2, [2])]
    with pytest.raises(InvalidPlan, match="no server has a slot free or a copy too many"):
        list(order(present, target, np.array([1, 1, 1])))
