"""What befalls a fleet, drawn from a seed: the same seed gives the same faults at the same times."""

from __future__ import annotations

import random
from dataclasses import dataclass

SECONDS = 3.0
"""Within which faults begin and end."""
LOW, HIGH, NEXT = "low", "high", "next"
SHARDS = {LOW: "0-7", HIGH: "8-15", NEXT: "0-15"}
"""Experts of each shard; the last one is of the next generation, another model of the same shape."""
REPLICAS = 2
TRANSPORTS = ("default", "grpc", "grpc-hedged", "exact-grpc", "exact-lane-hedged", "unix", "unix-lane", "thread")
"""Coordinators of the first generation; `speakers.py` has their options."""
REPLACING = ("kill", "drain", "other_model", "unread_log", "loss")
"""Kinds that put another process in the place of a server: one at a time in each place."""
ON_SERVER = (
    *("kill", "drain", "other_model", "unread_log", "freeze", "stutter", "few_files", "full_disk"),
    *("no_requests", "no_replies", "late_wire", "cut", "flap"),
)
ON_SHARD = ("loss",)
ON_DISCOVERY = ("no_file", "garbage_file", "empty_file", "folder_for_file", "shorter_file")
FAILPOINTS = {
    "delay": "delay=0.3:0.2",
    "slow": "delay=1:0.3",
    "drop": "drop=0.05",
    "reset": "reset=0.1",
    "corrupt_reply": "corrupt_reply=0.2",
    "wrong_receipt": "wrong_receipt=0.2",
    "crash_before": "crash_before=0.02",
    "crash_after": "crash_after=0.02",
    "device_error": "device_error=0.02",
    "stuck_device": "stuck_device=0.02:1.0",
    "slow_loading": "slow_loading=0.7:0.3",
    "stale_epoch": "stale_epoch=0.1",
}
"""Of servers that are born with them: nothing need be killed for them to begin."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One of them."""

    kind: str
    victim: str
    """A place, a shard, or a coordinator whose list of servers it is."""
    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is drawn from a seed."""

    seed: int
    coordinators: tuple[str, ...]
    births: dict[str, str]
    """Failpoints by place."""
    faults: tuple[Fault, ...]
    mortal: tuple[str, ...]
    """Places that faults may strike; mostly one replica of each shard is spared, and then no call may fail."""

    @property
    def places(self) -> tuple[str, ...]:
        shards = [shard for shard in SHARDS if shard != NEXT or NEXT in self.coordinators]
        return tuple(place(shard, replica) for shard in shards for replica in range(REPLICAS))


def place(shard: str, replica: int) -> str:
    return f"{shard}-{replica}"


def shard_of(place: str) -> str:
    return place.partition("-")[0]


def draw(seed: int) -> Plan:
    """The plan of `seed`."""
    chance = random.Random(seed)
    names = chance.sample(TRANSPORTS, 3)
    if chance.random() < 0.4:
        names[-1] = NEXT
    merciful = chance.random() < 0.7
    shards = [shard for shard in SHARDS if shard != NEXT or NEXT in names]
    victims = [place(shard, chance.randrange(REPLICAS)) for shard in shards]
    if not merciful:
        victims = [place(shard, replica) for shard in shards for replica in range(REPLICAS)]
    births = _births(chance, victims, names)
    kinds = chance.choices((*ON_SERVER, *ON_DISCOVERY, *(() if merciful else ON_SHARD * 3)), k=chance.randint(3, 7))
    faults: list[Fault] = []
    for kind in kinds:
        choices = names if kind in ON_DISCOVERY else shards if kind in ON_SHARD else victims
        at = chance.uniform(0.2, SECONDS - 1.0)
        fault = Fault(kind, chance.choice(choices), at, chance.uniform(0.3, SECONDS - at))
        if not any(_collide(fault, other) for other in faults):
            faults.append(fault)
    ordered = tuple(sorted(faults, key=lambda fault: fault.at))
    return Plan(seed, tuple(names), births, ordered, tuple(victims))


def _births(chance: random.Random, victims: list[str], coordinators: list[str]) -> dict[str, str]:
    kinds = list(FAILPOINTS)
    if not set(coordinators) <= {"grpc", "grpc-hedged", "exact-grpc", "unix"}:
        # Sums that are altered in shared memory have no checksum that would tell.
        kinds.remove("corrupt_reply")
    return {victim: chance.choice(kinds) for victim in victims if chance.random() < 0.4}


def _collide(one: Fault, other: Fault) -> bool:
    """Whether both would put processes in the same place, or content in the same file, at the same time."""
    apart = one.at + one.seconds + 0.1 < other.at or other.at + other.seconds + 0.1 < one.at
    if apart:
        return False
    if one.kind in ON_DISCOVERY or other.kind in ON_DISCOVERY:
        return one.victim == other.victim
    both = one.kind in REPLACING and other.kind in REPLACING
    return (both or one.kind == other.kind) and shard_of(one.victim) == shard_of(other.victim)
