"""Placement: what must hold for any loads and fleet, and how even it is beside published results."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from expertd.client.placement.assignment import (
    Fleet,
    InvalidPlan,
    Placement,
    balancedness,
    device_heat,
    place,
    place_by_layer,
    server_heat,
)
from expertd.client.placement.packing import POWER, Floats, bin_loads, count_copies, even_out

EPLB_LOADS = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]],
    np.float64,
)
"""The example of EPLB's README: 16 replicas on 8 GPUs of 2 nodes, 4 groups."""
EPLB_OUTPUT = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)
"""What it prints: the expert in each slot, two slots a GPU."""


def zipf_loads(experts: int, layers: int, exponent: float = 1.0) -> Floats:
    random = np.random.default_rng(0)
    return np.stack([random.permutation(np.arange(1, experts + 1.0) ** -exponent) for _ in range(layers)])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Floats, Fleet, int]:
    """Loads with zeros and ties, servers of different sizes in uneven nodes, and a number of groups that divides."""
    groups, size = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 4))
    experts = groups * size
    shape = (draw(st.integers(1, 3)), experts)
    loads = draw(arrays.arrays(np.float64, shape, elements=st.integers(0, 50).map(float)))
    slots = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    slots += [experts] if sum(slots) < experts else []
    nodes = draw(st.lists(st.integers(0, 2), min_size=len(slots), max_size=len(slots)))
    devices = draw(st.sampled_from([one for one in range(1, 7) if not any(count % one for count in slots)]))
    return loads, Fleet(tuple(slots), tuple(nodes), tuple(map(str, range(len(slots)))), devices), groups


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_expert_is_placed_and_no_server_overfull(case: tuple[Floats, Fleet, int]) -> None:
    loads, fleet, groups = case
    placement = place(loads, fleet, groups)
    assert placement.held.shape == (len(fleet.slots), loads.shape[1])
    assert (placement.copies() >= 1).all()
    assert (placement.held.sum(axis=1) <= fleet.slots).all()
    np.testing.assert_allclose(placement.server_heat(loads).sum(axis=1), loads.sum(axis=1))
    np.testing.assert_allclose(device_heat([placement] * len(loads), loads, fleet).sum(axis=1), loads.sum(axis=1))
    assert (place(loads, fleet, groups).held == placement.held).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 12), st.integers(1, 6))
def test_copies_go_to_the_most_loaded(loads: list[int], spare: int, most: int) -> None:
    weights = np.array(loads, np.float64)
    copies = count_copies(weights[:, None], len(loads) + spare, most)
    assert copies.sum() == min(len(loads) + spare, len(loads) * most)
    assert copies.max() <= most
    # No single copy moved to the most loaded expert that can take one would lower the largest load of a copy.
    for item in np.flatnonzero(copies > 1):
        open_items = copies < most
        if open_items.any():
            assert weights[item] / (copies[item] - 1) >= (weights / copies)[open_items].max() * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_swaps_keep_every_copy_and_lower_unevenness(seed: int) -> None:
    random = np.random.default_rng(seed)
    held = random.random((6, 10)) < 0.4
    held[0] |= ~held.any(axis=0)
    loads = random.random((10, 2))
    evened = even_out(loads, held, np.full(6, 10))
    assert (evened.sum(axis=0) == held.sum(axis=0)).all()
    assert (bin_loads(loads, evened) ** POWER).sum() < (bin_loads(loads, held) ** POWER).sum()


def eplb_balancedness(layer: int) -> float:
    slots = np.array(EPLB_OUTPUT[layer])
    loads = (EPLB_LOADS[layer] / np.bincount(slots))[slots].reshape(8, 2).sum(axis=1)
    return float(loads.mean() / loads.max())


@pytest.mark.parametrize("layer", [0, 1])
def test_as_even_as_eplb_on_its_example(layer: int) -> None:
    placement = place(EPLB_LOADS[[layer]], Fleet.uniform(8, 2, nodes=2), groups=4)
    assert placement.policy == "hierarchical"
    assert placement.balancedness(EPLB_LOADS[[layer]]) >= eplb_balancedness(layer) - 1e-12
    nodes_of_group = placement.held.reshape(2, 4, 4, 3).any(axis=(1, 3)).sum(axis=0)
    assert (nodes_of_group == 1).all(), "each group stands on one node"


@pytest.mark.parametrize(
    ("exponent", "servers", "slots", "nodes", "groups", "eplb"),
    [
        (0.5, 32, 9, 1, 1, 0.99817),
        (1.0, 32, 9, 1, 1, 0.99312),
        (1.5, 32, 9, 1, 1, 0.84894),
        (1.0, 32, 9, 4, 8, 0.76211),
    ],
)
def test_more_even_than_eplb_on_zipf_loads(
    exponent: float, servers: int, slots: int, nodes: int, groups: int, eplb: float
) -> None:
    # `eplb` is what its rebalance_experts reaches for these loads, in the mean of both layers.
    loads = zipf_loads(256, 2, exponent)
    fleet = Fleet.uniform(servers, slots, nodes)
    even = [place(layer[None], fleet, groups).balancedness(layer[None]) for layer in loads]
    assert np.mean(even) >= eplb


@pytest.mark.parametrize(("exponent", "groups", "least"), [(1.0, 8, 0.76211), (1.0, 1, 0.98), (1.5, 1, 0.84)])
def test_devices_of_servers_are_as_even_as_by_eplb(exponent: float, groups: int, least: float) -> None:
    # The first is what its rebalance_experts reaches for 4 nodes of 8 GPUs with 9 slots each.
    loads = zipf_loads(256, 1, exponent)
    fleet = Fleet.uniform(4, 72, 4, devices=8)
    placements = place_by_layer(loads, fleet, groups)
    assert all((one.held.sum(axis=1) <= 72).all() and (one.copies() >= 1).all() for one in placements)
    shares = device_heat(placements, loads, fleet)
    assert shares.shape == (1, 32)
    np.testing.assert_allclose(shares.sum(axis=1), loads.sum(axis=1))
    assert balancedness(shares) >= least
    assert (device_heat(placements, loads, Fleet.uniform(4, 72, 4)) == server_heat(placements, loads)).all()


def test_copies_are_among_a_servers_devices_unless_an_expert_is_too_hot_for_them() -> None:
    warm = np.array([[8.0, 8, 1, 1, 1, 1, 1, 1]])
    fleet = Fleet.uniform(2, 6, devices=2)
    assert place(warm, fleet).copies().tolist() == [1] * 8
    assert balancedness(device_heat([place(warm, fleet)], warm, fleet)) == 1
    hot = np.array([[20.0, 1, 1, 1]])
    fleet = Fleet.uniform(2, 4, devices=2)
    assert place(hot, fleet).copies().tolist() == [2, 2, 1, 1]
    assert balancedness(device_heat([place(hot, fleet)], hot, fleet)) > 0.9


def test_one_placement_serves_all_layers() -> None:
    loads = zipf_loads(64, 4)
    fleet = Fleet.uniform(8, 12)
    one_layer = place(loads[:1], fleet)
    assert place(loads, fleet).balancedness(loads) > one_layer.balancedness(loads) + 0.05


def test_layers_that_are_placed_alone_are_even() -> None:
    loads = zipf_loads(256, 58)
    fleet = Fleet.uniform(8, 40)
    by_layer = place_by_layer(loads, fleet)
    assert all((one.held.sum(axis=1) <= 40).all() and (one.copies() >= 1).all() for one in by_layer)
    shares = server_heat(by_layer, loads)
    np.testing.assert_allclose(shares.sum(axis=1), loads.sum(axis=1))
    assert balancedness(shares) > 0.9995
    with pytest.raises(InvalidPlan, match=r"loads have shape \[0, 4\]"):
        place_by_layer(np.ones((0, 4)), fleet)


def test_the_hot_expert_is_copied_and_balancedness_is_mean_over_largest() -> None:
    placement = place(np.array([[8.0, 1, 1, 1, 1]]), Fleet.uniform(4, 2))
    assert placement.copies().tolist() == [4, 1, 1, 1, 1]
    assert placement.balancedness(np.array([[8.0, 1, 1, 1, 1]])) == 1.0
    uneven = Placement(np.array([[True, False], [False, True]]), "global")
    assert uneven.balancedness(np.array([[3.0, 1], [0, 0]])) == pytest.approx(2 / 3)


def test_groups_that_cannot_stay_together_are_placed_globally() -> None:
    assert place(np.ones((1, 12)), Fleet.uniform(6, 2, nodes=3), groups=4).policy == "global"
    assert place(np.ones((1, 12)), Fleet.uniform(8, 2, nodes=8), groups=4).policy == "global"


@pytest.mark.parametrize(
    ("loads", "slots", "groups", "message"),
    [
        ([[1.0, -1.0]], 2, 1, "^loads hold a negative"),
        ([[1.0, np.nan]], 2, 1, "^loads hold a negative or not finite"),
        ([[]], 2, 1, "^loads have shape"),
        ([[1.0, 1.0, 1.0]], 1, 1, "^the fleet has 2 slots for 3 experts"),
        ([[1.0, 1.0, 1.0]], 2, 2, "^groups is 2; it must divide"),
    ],
)
def test_impossible_plans_are_refused(loads: list[list[float]], slots: int, groups: int, message: str) -> None:
    with pytest.raises(InvalidPlan, match=message):
        place(np.array(loads), Fleet.uniform(2, slots), groups)


def test_bad_fleets_are_refused() -> None:
    with pytest.raises(InvalidPlan, match=r"^slots are"):
        Fleet.uniform(0, 2)
    with pytest.raises(InvalidPlan, match=r"^nodes is 3; it must divide"):
        Fleet.uniform(8, 2, 3)
    with pytest.raises(InvalidPlan, match=r"^two servers have the same name"):
        Fleet((1, 1), (0, 0), ("a", "a"))
