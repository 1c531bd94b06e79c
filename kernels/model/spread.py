"""Which devices of a server have which of its experts: pure functions, for one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Held: TypeAlias = tuple[tuple[int, ...], ...]
"""By device, the experts that it has, global ids; a place in a tuple is what the device knows an expert by."""


def even_room(experts: int, devices: int) -> int:
    """How many experts a device has if each has as many, and none has more than it must."""
    return -(-experts // devices)


def spread(experts: Sequence[int], devices: int, room: int, loads: Sequence[float] | None = None) -> Held:
    """`experts` over `devices`, each of which has exactly `room` of them, or all if there are no more than that.

    What is left of the room holds copies: of those experts whose copies have most to do, by `loads`, one number for
    each expert (None: all alike). Without copies and loads devices have runs of experts. Raises `ValueError` where
    there is no room for all.
    """
    room = min(room, len(experts))
    if devices * room < len(experts):
        raise ValueError(f"{len(experts)} experts: {devices} devices with room for {room} each have too little")
    if loads is None and devices * room == len(experts):
        return tuple(tuple(experts[device * room : (device + 1) * room]) for device in range(devices))
    heat = dict(zip(experts, [1.0] * len(experts) if loads is None else loads, strict=True))
    copies = _copies(heat, devices, devices * room)
    held: list[list[int]] = [[] for _ in range(devices)]
    load = [0.0] * devices
    # Those with copies first, on the devices with most room: all have as much until others come, which fit anywhere.
    for expert in sorted(experts, key=lambda expert: (-copies[expert], -heat[expert] / copies[expert], expert)):
        several = copies[expert] > 1
        places = [device for device in range(devices) if len(held[device]) < room]
        places.sort(key=lambda device: (len(held[device]) if several else 0, load[device], device))
        for device in places[: copies[expert]]:
            held[device].append(expert)
            load[device] += heat[expert] / copies[expert]
    return tuple(tuple(sorted(its)) for its in held)


def respread(held: Held, experts: Sequence[int], room: int, sound: Sequence[int]) -> Held:
    """What devices have when a layer's experts become `experts`: those that stay do so where they are, new ones come to
    the `sound` devices with most room. For them, copies leave of experts that others have too.

    Raises `ValueError` where there is no room for all.
    """
    wanted = set(experts)
    after = [
        [expert for expert in its if expert in wanted] if device in sound else [] for device, its in enumerate(held)
    ]
    new = sorted(wanted.difference(*after))
    missing = len(new) - sum(room - len(after[device]) for device in sound)
    for device in sorted(sound, key=lambda device: -len(after[device])):
        for expert in tuple(after[device]):
            if missing > 0 and sum(expert in its for its in after) > 1:
                after[device].remove(expert)
                missing -= 1
    if missing > 0:
        raise ValueError(f"{len(experts)} experts of a layer: the devices have room for {room * len(sound)}")
    for expert in new:
        after[min(sound, key=lambda device: (len(after[device]), device))].append(expert)
    return tuple(tuple(sorted(its)) for its in after)


def _copies(heat: dict[int, float], devices: int, slots: int) -> dict[int, int]:
    """How often each expert is there, at least once and on each device at most, `slots` in all."""
    copies = dict.fromkeys(heat, 1)
    for _ in range(slots - len(heat)):
        fewer = (expert for expert in heat if copies[expert] < devices)
        busiest = max(fewer, key=lambda expert: (heat[expert] / copies[expert], -copies[expert], -expert))
        copies[busiest] += 1
    return copies
