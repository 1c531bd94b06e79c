"""What is drawn from seeds."""

from collections import Counter

from tests.chaos.composed.schedule import (
    FAILPOINTS,
    NEXT,
    ON_DISCOVERY,
    ON_SERVER,
    ON_SHARD,
    SECONDS,
    TRANSPORTS,
    draw,
    shard_of,
)

SEEDS = range(200)


def test_a_seed_gives_the_same_faults_each_time() -> None:
    assert [draw(seed) for seed in SEEDS] == [draw(seed) for seed in SEEDS]
    assert len({draw(seed).faults for seed in SEEDS}) == len(SEEDS)


def test_every_kind_befalls_every_coordinator_in_two_hundred_seeds() -> None:
    plans = [draw(seed) for seed in SEEDS]
    met = {(name, fault.kind) for plan in plans for name in plan.coordinators for fault in plan.faults}
    kinds = {*ON_SERVER, *ON_DISCOVERY, *ON_SHARD}
    assert met == {(name, kind) for name in (*TRANSPORTS, NEXT) for kind in kinds}
    assert {kind for plan in plans for kind in plan.births.values()} == set(FAILPOINTS)


def test_faults_end_in_time_and_strike_who_may_be_struck() -> None:
    for plan in map(draw, SEEDS):
        spared = {shard_of(place) for place in set(plan.places) - set(plan.mortal)}
        assert spared in (set(), {shard_of(place) for place in plan.places})
        assert set(plan.births) <= set(plan.mortal)
        for fault in plan.faults:
            assert fault.at + fault.seconds <= SECONDS
            if fault.kind in ON_SERVER:
                assert fault.victim in plan.mortal
            if fault.kind in ON_SHARD:
                assert not spared


def test_places_and_lists_have_one_fault_at_a_time_that_replaces_what_is_there() -> None:
    for plan in map(draw, SEEDS):
        for kinds in (("kill", "drain", "other_model", "unread_log", "loss"), ON_DISCOVERY):
            ends = Counter[str]()
            for fault in (fault for fault in plan.faults if fault.kind in kinds):
                victim = fault.victim if fault.kind in ON_DISCOVERY else shard_of(fault.victim)
                assert fault.at > ends[victim]
                ends[victim] = fault.at + fault.seconds  # type: ignore[assignment]
