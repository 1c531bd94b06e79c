"""Plans from a present placement: whole, within slots, few moves, and each of them for something."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.exchanges import State, _alone, _between, exchange
from expertd.client.placement.moves import EVEN, WORTH, loads_of, replan, walk
from expertd.client.placement.packing import Booleans, Floats, Integers

Case = tuple[Floats, Booleans, Integers, Integers]
"""Loads, what devices have, their slots, and how many devices each server has."""


def halves(servers: int, experts: int) -> Booleans:
    """[servers, experts]: equal ranges, in order."""
    return np.repeat(np.eye(servers, dtype=np.bool_), experts // servers, axis=1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Loads with zeros and ties; placements with lost experts, full devices, and some that are to leave."""
    devices = np.array(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    count, experts = devices.sum(), draw(st.integers(1, 10))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    held = random.random((count, experts)) < draw(st.sampled_from([0.1, 0.4, 0.8]))
    slots = np.where(random.random(count) < 0.2, 0, random.integers(1, 5, count))
    slots[-1] += max(0, experts - slots.sum())
    load = np.floor(random.random(experts) * 4) * random.random(experts)
    return load * draw(st.sampled_from([0.0, 1.0, 1e9])), held, slots, devices


@settings(max_examples=300, deadline=None)
@given(cases())
def test_placements_are_whole_and_fit_and_each_is_more_even(case: Case) -> None:
    load, present, slots, devices = case
    path = walk(load, present, slots, devices)
    for held in path.held:
        assert held.any(axis=0).all()
        assert (held.sum(axis=1) <= slots).all()
    assert list(path.moves) == [int((held & ~present).sum()) for held in path.held]
    chosen = replan(load[None], present[None], slots[None], devices=devices)[0]
    spent = int((chosen & ~present).sum()) - path.moves[0]
    start, end = (loads_of(load, held, devices).max() for held in (path.held[0], chosen))
    mean = load.sum() / max(np.count_nonzero(slots), 1)
    assert end <= start - spent * WORTH * mean * (1 - 1e-9)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_an_exchange_does_what_it_was_chosen_for(case: Case) -> None:
    load, present, slots, devices = case
    held = walk(load, present, slots, devices).held[0]
    after = exchange(State(load, held, slots, devices))
    if after is not None:
        before, then = (np.sort((loads_of(load, one, devices) / load.sum()) ** 8).sum() for one in (held, after))
        assert then < before


@settings(max_examples=200, deadline=None)
@given(cases())
def test_what_an_exchange_changes_is_what_it_is_weighed_by(case: Case) -> None:
    load, present, slots, devices = case
    held = walk(load, present, slots, devices).held[0]
    full, *others = np.argsort(-loads_of(load, held, devices)).tolist()
    state = State(load, held, slots, devices)
    pairs = [_alone(state, full)]
    pairs += [pair for other in others if slots[other] for pair in _between(state, full, other)]
    for first, second in pairs:
        for one, two in itertools.product(range(len(first.experts)), range(len(second.experts))):
            after = held.copy()
            first.apply(one, after)
            second.apply(two, after)
            weighed = loads_of(load, held, devices) + first.change[one] + second.change[two]
            np.testing.assert_allclose(loads_of(load, after, devices), weighed, atol=1e-9 * load.sum())
            assert (after.sum(axis=1) <= slots).all()
            assert after.any(axis=0).all()


def test_a_hot_expert_is_copied_and_nothing_else_moves() -> None:
    heat = np.array([9.0, 1, 1, 1, 1, 1, 1, 1])
    present = halves(4, 8)
    (after,) = replan(heat[None], present[None], np.full((1, 4), 3))
    assert (after & ~present)[:, 1:].sum() == 0
    assert after[:, 0].sum() == 4
    assert (after & ~present).sum() == 3


def test_servers_share_what_they_both_have_and_so_do_devices_of_each() -> None:
    """The first expert is twice on the first server, and once on the second one."""
    held = np.array([[True, True], [True, False], [True, False], [False, False]])
    load, devices = np.array([8.0, 1.0]), np.array([2, 2])
    assert loads_of(load, held, devices).tolist() == [3, 2, 4, 0]
    assert (
        loads_of(load, held[:, :1] & held, np.array([2, 1, 1])).tolist()
        == loads_of(load, held, np.array([2, 1, 1])).tolist()
    )


def test_a_hot_expert_is_copied_among_devices_and_cold_ones_leave_its_own() -> None:
    heat, present = np.array([6.0, 1, 1, 1, 1, 1, 1, 1]), halves(4, 8)
    (after,) = replan(heat[None], present[None], np.full((1, 4), 3), devices=np.array([2, 2]))
    loads = [loads_of(heat, held, np.array([2, 2])) for held in (present, after)]
    assert loads[0].max() == 7
    assert loads[1].max() < 4.01
    assert (after.sum(axis=1) <= 3).all()


def test_even_loads_are_left_alone() -> None:
    present = halves(4, 8)
    assert (replan(np.ones((1, 8)), present[None], np.full((1, 4), 3)) == present).all()
    slight = np.array([1.0 + EVEN / 500, 1, 1, 1, 1, 1, 1, 1])
    assert (replan(slight[None], present[None], np.full((1, 4), 3)) == present).all()


def test_full_servers_without_copies_cannot_move_anything() -> None:
    present = halves(2, 4)
    assert (replan(np.array([[9.0, 9, 1, 1]]), present[None], np.full((1, 2), 2)) == present).all()
    swapped = replan(np.array([[9.0, 9, 1, 1]]), present[None], np.array([[2, 3]]))[0]
    assert loads_of(np.array([9.0, 9, 1, 1]), swapped).max() == pytest.approx(10)


@pytest.mark.parametrize("devices", [None, np.full(4, 8)])
def test_little_room_is_used_again_when_other_experts_are_hot(devices: Integers | None) -> None:
    """Copies of experts that are no longer hot make room, on whichever device."""
    random, held = np.random.default_rng(5), halves(32, 256)
    for _ in range(4):
        heat = random.permutation(1 / np.arange(1.0, 257))
        (held,) = replan(heat[None], held[None], np.full((1, 32), 9), devices=devices)
    loads = loads_of(heat, held, devices)
    assert loads.max() < 1.12 * loads.mean()


def test_moves_go_where_they_buy_most() -> None:
    heat = np.array([[9.0, 9, 1, 1, 1, 1, 1, 1], [3, 2, 1, 1, 1, 1, 1, 1]])
    present, slots = np.stack([halves(4, 8)] * 2), np.full((2, 4), 3)
    for limit, moves in ((1, [1, 0]), (2, [1, 1])):
        after = replan(heat, present, slots, most_moves=limit)
        assert (after & ~present).sum(axis=(1, 2)).tolist() == moves
    assert (replan(heat, present, slots) & ~present).sum() > 2


def test_what_nobody_owns_is_placed_whatever_the_limit() -> None:
    present = halves(4, 8)
    present[0] = False
    after = replan(np.ones((1, 8)), present[None], np.array([[0, 4, 4, 4]]), most_moves=1)[0]
    assert after.any(axis=0).all()
    assert after.sum(axis=1).tolist()[0] == 0
    with pytest.raises(InvalidPlan, match=r"the fleet has 7 slots for 8 experts; .* give more --slots"):
        replan(np.ones((1, 8)), present[None], np.array([[0, 2, 2, 3]]))
