"""A replica that is late is asked only in need, and like the others once it is as fast again."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.client.coordinator import Coordinator
from expertd.client.fleet import latency
from expertd.client.fleet.latency import AS_FAST, Latency, Slowness, compare
from expertd.client.fleet.pace import FIRST_TRIAL, Pace
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.tasks import Tasks
from expertd.server.rpc.incoming import Incoming
from tests.support.coordinators import LAYER, QUICK, call, expected
from tests.support.fleets import addresses, computed_tokens, running_servers
from tests.support.model.requests import parse_request
from tests.support.serving import Answers, running_server, until

ALL = range(16)
OVER_GRPC = replace(QUICK, shared_memory_bytes=0)
LATE_SECONDS = 0.5
CALLERS = 8


def test_servers_are_compared_in_sizes_that_several_know() -> None:
    known = {1: {3: 0.010, 5: 0.020}, 2: {3: 0.011, 5: 0.090}, 3: {7: 9.0}}
    found = compare(known)
    assert found[1] == found[3] == AS_FAST
    assert found[2] == pytest.approx(Slowness(4.5, 0.07))
    assert found[2].is_outlier
    assert not Slowness(4.5, 0.01).is_outlier
    assert not Slowness(2.5, 1.0).is_outlier


def test_answers_of_one_size_are_weighed_by_their_length_and_forgotten() -> None:
    now = time.monotonic()
    known = Latency(lambda: now)
    for _ in range(latency.FEWEST - 1):
        known.answered(5, 1.0)
    assert known.known(now) == {}
    known.answered(7, 2.0)
    assert known.known(now) == {3: pytest.approx((3 * 1.0 + 2.0**2) / (3 * 1.0 + 2.0))}
    assert known.known(now + latency.FORGOTTEN_SECONDS + 1) == {}
    now += latency.FORGOTTEN_SECONDS + 1
    known.answered(7, 5.0)
    assert known.known(now) == {}
    known.forget()
    assert known.known(now) == {}


@pytest.mark.parametrize("answers", [1, 200])
def test_a_server_that_stands_still_now_and_then_is_an_outlier_whenever_one_looks(answers: int) -> None:
    """Of 0.4 s it stands still for 0.2; in the others it answers in 1 ms, however often."""
    now = 0.0
    stuttering, steady = Latency(lambda: now), Latency(lambda: now)
    looked = 0
    for _ in range(10):
        for _ in range(answers):
            now += 0.2 / answers
            stuttering.answered(1, 0.001)
            steady.answered(1, 0.001)
            if now > 1.0:
                looked += 1
                assert compare({0: stuttering.known(now), 1: steady.known(now)})[0].is_outlier
        now += 0.2
        stuttering.answered(1, 0.2)
    assert looked >= 5


def test_a_steady_server_is_as_fast_at_any_pace() -> None:
    now = 0.0
    often, seldom = Latency(lambda: now), Latency(lambda: now)
    for _ in range(2000):
        now += 0.001
        often.answered(1, 0.005)
    for _ in range(9):
        now += 1.0
        seldom.answered(1, 0.005)
    assert often.known(2.0) == {1: pytest.approx(0.005)}
    assert seldom.known(now) == {1: pytest.approx(0.005)}


class Late:
    """Has a server answer late, as long as it is told to."""

    def __init__(self, server: object) -> None:
        self.seconds = LATE_SECONDS
        self.calls = 0
        """That it was asked for, without trials."""
        self._answers = Answers(server, self._answer)  # type: ignore[arg-type]

    async def _answer(self, incoming: Incoming) -> bytes:
        self.calls += parse_request(incoming.message).request_id < FIRST_TRIAL
        await asyncio.sleep(self.seconds)
        return await self._answers.real(incoming)


async def test_a_late_replica_keeps_no_share_of_the_calls_and_gets_it_back(small_model: Path) -> None:
    right = expected(small_model)
    async with (
        running_servers(small_model, [ALL, ALL, ALL]) as servers,
        Coordinator(addresses(servers), OVER_GRPC) as moe,
    ):
        late = Late(servers[0])
        member = moe._connected().membership.members[0]
        calls, over = 0, False

        async def keep_calling() -> None:
            nonlocal calls
            while not over:
                assert relative_error(await call(moe), right) < 1e-5
                calls += 1

        async with asyncio.TaskGroup() as callers:
            for _ in range(CALLERS):
                callers.create_task(keep_calling())
            await until(lambda: member.slow)
            # What was under way then may be on its way to it.
            await asyncio.sleep(2 * LATE_SECONDS)
            before, asked = calls, late.calls
            assert asked > 0
            await asyncio.sleep(2.5)
            over = True
        print(f"{calls - before} calls, of them {late.calls - asked} asked the late server")
        assert calls - before > 100
        assert late.calls - asked <= (calls - before) / 200
        late.seconds = 0.0
        await until(lambda: not member.slow)
        computed = computed_tokens(servers[0])
        for _ in range(12):
            await call(moe)
        assert computed_tokens(servers[0]) > computed


async def test_one_server_at_least_is_not_slow(small_model: Path) -> None:
    """Of two that are slow in different sizes the slower one is set aside, and tried against the other."""
    async with (
        running_servers(small_model, [ALL, ALL]) as servers,
        Coordinator(addresses(servers), OVER_GRPC) as moe,
    ):
        first, second = members = list(moe._connected().membership.members.values())
        for _ in range(latency.FEWEST):
            first.answered(LAYER, 1, 1, 0.4)
            second.answered(LAYER, 1, 1, 0.01)
            first.answered(LAYER, 100, 1, 0.01)
            second.answered(LAYER, 100, 1, 0.5)
        tasks = Tasks()
        Pace(lambda: members, tasks).compare()
        assert [member.slow for member in members] == [False, True]
        await until(lambda: not second.slow)
        await tasks.close()


async def test_a_slow_server_that_owns_nothing_any_more_fails_its_trials(small_model: Path) -> None:
    async with (
        running_servers(small_model, [ALL, ALL]) as servers,
        Coordinator(addresses(servers), OVER_GRPC) as moe,
    ):
        members = list(moe._connected().membership.members.values())
        whole = members[1].shard
        assert whole is not None
        members[1].shard = replace(whole, experts={})
        pace = Pace(lambda: members, Tasks())
        assert await pace._trial(members[0]) is not None
        assert await pace._trial(members[1]) is None
        assert pace._comparable() == members[:1]


async def test_the_only_owner_is_asked_however_slow_it_is(small_model: Path) -> None:
    async with (
        running_server(small_model, range(8)) as one,
        running_server(small_model, range(8, 16)) as other,
        Coordinator(addresses([one, other]), OVER_GRPC) as moe,
    ):
        Late(one).seconds = 0.1
        for _ in range(12):
            assert relative_error(await call(moe), expected(small_model)) < 1e-5
        await until(lambda: moe._connected().membership.members[0].slow)
        assert relative_error(await call(moe), expected(small_model)) < 1e-5
