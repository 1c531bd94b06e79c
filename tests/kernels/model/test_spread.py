"""Experts over devices: every one is somewhere, no device has more than its room, and hot ones are on several."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.kernels.model.spread import even_room, respread, spread


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[int], int, int, list[float] | None]:
    experts = sorted(draw(st.sets(st.integers(0, 300), min_size=1, max_size=40)))
    devices = draw(st.integers(1, 8))
    room = draw(st.integers(even_room(len(experts), devices), len(experts)))
    loads = st.lists(st.floats(0, 1e6), min_size=len(experts), max_size=len(experts))
    return experts, devices, room, draw(st.none() | loads)


@settings(deadline=None, max_examples=50)
@given(layers())
def test_each_device_has_as_many_distinct_experts_as_there_is_room_for_and_each_expert_a_device(
    layer: tuple[list[int], int, int, list[float] | None],
) -> None:
    experts, devices, room, loads = layer
    held = spread(experts, devices, room, loads)
    assert [len(set(its)) for its in held] == [len(its) for its in held] == [room] * devices
    assert set().union(*held) == set(experts)
    assert held == spread(experts, devices, room, loads)


@settings(deadline=None, max_examples=50)
@given(layers())
def test_a_copy_has_no_less_to_do_than_what_has_fewer(layer: tuple[list[int], int, int, list[float] | None]) -> None:
    experts, devices, room, loads = layer
    copies = Counter(expert for its in spread(experts, devices, room, loads) for expert in its)
    heat = dict(zip(experts, loads or [1.0] * len(experts), strict=True))
    last = min((heat[one] / (copies[one] - 1) for one in experts if copies[one] > 1), default=float("inf"))
    more = max((heat[one] / copies[one] for one in experts if copies[one] < devices), default=0.0)
    assert more <= last * (1 + 1e-9)


def test_without_loads_devices_have_runs_of_experts() -> None:
    assert spread(range(10, 18), 4, 2) == ((10, 11), (12, 13), (14, 15), (16, 17))


def test_loads_are_even_where_they_can_be() -> None:
    loads = [90, 10, 20, 80, 70, 30, 40, 60]
    held = spread(range(8), 4, 2, loads)
    assert [sum(loads[expert] for expert in its) for its in held] == [100] * 4


def test_the_hottest_expert_has_copies() -> None:
    held = spread(range(6), 2, 4, [1, 1, 50, 1, 40, 1])
    assert all({2, 4} <= set(its) for its in held)


def test_too_little_room_is_refused() -> None:
    with pytest.raises(ValueError, match="9 experts: 2 devices with room for 4 each have too little"):
        spread(range(9), 2, 4)


@settings(deadline=None, max_examples=50)
@given(layers(), st.data())
def test_what_stays_is_where_it_was(layer: tuple[list[int], int, int, list[float] | None], data: st.DataObject) -> None:
    experts, devices, room, loads = layer
    held = spread(experts, devices, room, loads)
    sound = data.draw(st.sets(st.integers(0, devices - 1), min_size=1))
    wanted = data.draw(st.sets(st.integers(0, 400), max_size=room * len(sound)))
    after = respread(held, sorted(wanted), room, sorted(sound))
    assert set().union(*after) == wanted
    assert all(len(its) <= room for its in after)
    assert all(not its for device, its in enumerate(after) if device not in sound)
    for device in sound:
        there = set().union(*(held[one] for one in sound))
        assert all(expert in held[device] for expert in after[device] if expert in there)


def test_respreading_has_bounds() -> None:
    with pytest.raises(ValueError, match="5 experts of a layer: the devices have room for 4"):
        respread(((0, 1), (2, 3)), range(5), 2, (0, 1))
