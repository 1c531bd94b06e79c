"""What a coordinator does about servers that are late, full, elsewhere, wrong or missing."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.client.call.budget import RetryBudget
from expertd.client.call.hedging import Lateness
from expertd.client.call.result import Effort
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.fleet import pace
from expertd.client.sync import SyncCoordinator
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import Overloaded, ServerFault, Unavailable
from expertd.server.app import Server
from expertd.server.failpoints import VARIABLE
from expertd.server.rpc.incoming import Incoming
from tests.support.coordinators import EXACT, LAYER, call, expected, oracle, routing, tokens
from tests.support.fleets import addresses, computed_tokens, stop
from tests.support.serving import Answers, count_of, running_server, until

ALL = range(16)
DELAY = 2.0
FAULTS = ("corrupt_reply=0.5", "wrong_receipt=0.5", "stale_epoch=0.1", "reset=0.2", "delay=0.5")
# Faults of replies are those of the wire.
QUICK = replace(EXACT, connect_timeout=2.0, shared_memory_bytes=0)


@contextlib.asynccontextmanager
async def faulty_server(model: Path, fault: str, experts: range = ALL, **options: Any) -> AsyncIterator[Server]:  # noqa: ANN401
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, fault)
        serving = running_server(model, experts, **options)
        server = await serving.__aenter__()
    try:
        yield server
    finally:
        await serving.__aexit__(None, None, None)


@pytest.mark.parametrize(
    "fault", ["corrupt_reply=0.5", "wrong_receipt=0.5", "stale_epoch=0.1", "reset=0.2", "delay=0.5"]
)
async def test_faults_of_one_replica_reach_no_caller(small_model: Path, fault: str) -> None:
    async with (
        faulty_server(small_model, f"{fault},seed=3") as faulty,
        running_server(small_model, ALL) as sound,
        Coordinator(addresses([faulty, sound]), QUICK) as moe,
    ):
        for seed in range(8):
            outputs = await asyncio.gather(*(call(moe, seed) for _ in range(4)))
            assert all(relative_error(output, expected(small_model, seed)) < 1e-5 for output in outputs)
        assert computed_tokens(faulty) > 0


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("corrupt_reply=1", "altered on its way: its checksum does not match its partials"),
        ("wrong_receipt=1", r"the receipt does not match the request: expert 0: \d+ pairs sent, 21 computed"),
    ],
)
async def test_answers_that_are_always_wrong_are_never_used(small_model: Path, fault: str, complaint: str) -> None:
    async with faulty_server(small_model, fault) as server, Coordinator(addresses([server]), QUICK) as moe:
        with pytest.raises((ServerFault, Unavailable), match=complaint):
            await call(moe)


async def test_a_placement_that_changes_all_the_time_is_planned_again_by_its_only_owner(small_model: Path) -> None:
    async with (
        faulty_server(small_model, "stale_epoch=0.05,seed=1") as server,
        Coordinator(addresses([server]), QUICK) as moe,
    ):
        retries = 0
        for seed in range(40):
            ids, weights = routing(20, seed)
            result = await moe.execute(LAYER, tokens(20, seed), topk_ids=ids, topk_weights=weights)
            assert relative_error(result.output, expected(small_model, seed)) < 1e-5
            retries += result.effort.retries
        assert retries > 0


async def test_a_late_answer_is_asked_for_elsewhere_as_well(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Or the one that is late would be set aside before anything is known of how late is late.
    monkeypatch.setattr(pace, "JUDGE_SECONDS", 1e9)
    config = replace(QUICK, hedge_quantile=0.9)
    async with (
        faulty_server(small_model, f"delay=0.1:{DELAY},seed=2") as late,
        running_server(small_model, ALL) as prompt,
        Coordinator(addresses([late, prompt]), config) as moe,
    ):
        right = expected(small_model)
        hedges, seconds = 0, []

        async def timed_call() -> None:
            nonlocal hedges
            ids, weights = routing(20)
            started = time.monotonic()
            result = await moe.execute(LAYER, tokens(20), topk_ids=ids, topk_weights=weights)
            seconds.append(time.monotonic() - started)
            assert relative_error(result.output, right) < 1e-5
            hedges += result.effort.hedges

        # Two at a time: one for each server.
        for _ in range(100):
            await asyncio.gather(timed_call(), timed_call())
        assert max(seconds[:100]) > DELAY, "nothing was late, so nothing was tested"
        assert hedges > 0
        assert max(seconds[100:]) < DELAY


def test_what_is_late_is_known_only_after_enough_answers() -> None:
    lateness = Lateness(0.9)
    for seconds in range(1, 64):
        lateness.answered(seconds)
        assert lateness.limit is None
    for seconds in range(64, 129):
        lateness.answered(seconds)
    assert lateness.limit == 116


def test_a_retry_budget_allows_a_burst_and_then_a_share() -> None:
    budget = RetryBudget(ratio=0.25, burst=3)
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
    budget.earn(8)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    budget.earn(1000)
    assert sum(budget.take() for _ in range(10)) == 3


async def test_retries_stop_when_the_budget_is_used_up(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = 0

    async def refuse(*_: object) -> bytes:
        nonlocal attempts
        attempts += 1
        raise Overloaded("always full")

    config = replace(QUICK, retry_ratio=0.0, retry_burst=5)
    async with running_server(small_model, ALL) as server, Coordinator(addresses([server]), config) as moe:
        Answers(server, refuse)
        for _ in range(10):
            with pytest.raises(Overloaded):
                await call(moe)
    assert attempts == 10 + 5


async def test_a_server_that_drains_is_left_before_it_refuses_anything(small_model: Path) -> None:
    ids, weights = routing(20)
    async with (
        running_server(small_model, ALL, locality="here") as draining,
        running_server(small_model, ALL) as other,
        Coordinator(addresses([draining, other]), replace(QUICK, locality="here")) as moe,
    ):
        await call(moe)
        assert computed_tokens(draining) == 20
        await stop(draining)
        result = await moe.execute(LAYER, tokens(20), topk_ids=ids, topk_weights=weights)
        assert result.effort == Effort()
        assert computed_tokens(other) == 20


async def test_a_server_that_drains_under_load_refuses_nobody_who_watches_its_health(small_model: Path) -> None:
    async with (
        running_server(small_model, ALL) as draining,
        running_server(small_model, ALL) as other,
        Coordinator(addresses([draining, other]), QUICK) as moe,
    ):
        right, leaving = expected(small_model), asyncio.Event()

        async def repeat() -> None:
            while not leaving.is_set() or computed_tokens(other) < enough:
                assert relative_error(await call(moe), right) < 1e-5

        enough = 0.0
        callers = [asyncio.create_task(repeat()) for _ in range(4)]
        await until(lambda: computed_tokens(draining) > 400)
        await stop(draining)
        enough = computed_tokens(other) + 400
        leaving.set()
        await asyncio.gather(*callers)
        assert count_of(draining, "unavailable") == 0
        assert count_of(draining, "ok") > 0


async def test_a_full_server_is_asked_again_when_it_wants_to_be(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_server(small_model, ALL) as server, Coordinator(addresses([server]), QUICK) as moe:
        asked: list[float] = []

        async def refuse_once(incoming: Incoming) -> bytes:
            asked.append(time.monotonic())
            if len(asked) == 1:
                raise Overloaded("full for now", retry_after=0.6)
            return await answers.real(incoming)

        answers = Answers(server, refuse_once)
        assert relative_error(await call(moe), expected(small_model)) < 1e-5
        assert asked[1] - asked[0] >= 0.6


async def test_a_busy_server_is_passed_over_for_as_long_as_it_asked(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        running_server(small_model, ALL) as full,
        running_server(small_model, ALL) as free,
        Coordinator(addresses([full, free]), QUICK) as moe,
    ):
        refusals = 0

        async def refuse(*_: object) -> bytes:
            nonlocal refusals
            refusals += 1
            raise Overloaded("full", retry_after=30.0)

        Answers(full, refuse)
        for seed in range(10):
            assert relative_error(await call(moe, seed), expected(small_model, seed)) < 1e-5
        assert refusals <= 1


async def test_servers_of_the_own_locality_are_preferred_until_they_are_lost(small_model: Path) -> None:
    async with (
        running_server(small_model, ALL, locality="here") as near,
        running_server(small_model, ALL, locality="there") as far,
        Coordinator(addresses([far, near]), replace(QUICK, locality="here")) as moe,
    ):
        await asyncio.gather(*(call(moe, seed) for seed in range(20)))
        assert computed_tokens(near) == 20 * 20
        assert computed_tokens(far) == 0
        await stop(near)
        await call(moe)
        assert computed_tokens(far) == 20


async def test_missing_experts_are_left_out_only_where_that_was_asked_for_and_never_in_silence(
    small_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hidden, (ids, weights) = tokens(30), routing(30)
    ids[0] = torch.tensor([0, 1, 2, 3])
    ids[1] = torch.tensor([8, 9, 10, -1])
    config = replace(QUICK, on_missing="renormalize")
    async with (
        running_server(small_model, range(8)) as lost,
        running_server(small_model, range(8, 16)) as kept,
        Coordinator(addresses([lost, kept]), config) as moe,
        Coordinator(addresses([lost, kept]), QUICK) as strict,
    ):
        whole = await moe.execute(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        assert (whole.degraded_tokens, whole.missing_experts) == (0, ())
        await stop(lost)
        result = await moe.execute(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        with pytest.raises(Unavailable, match="no server that can be reached owns experts"):
            await strict.execute(LAYER, hidden, topk_ids=ids, topk_weights=weights)
    gone = (ids >= 0) & (ids < 8)
    share = weights.masked_fill(ids < 0, 0).sum(1, keepdim=True) / weights.masked_fill(gone | (ids < 0), 0).sum(
        1, keepdim=True
    )
    renormalized = (weights * share).nan_to_num(posinf=0.0)
    right = oracle(small_model, hidden, ids.masked_fill(gone, -1), renormalized)
    assert relative_error(result.output, right) < 1e-5
    assert not result.output[0].any()
    assert torch.equal(result.output[1], whole.output[1])
    assert result.degraded_tokens == int(gone.any(dim=1).sum())
    assert result.missing_experts == tuple(range(8))
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"layer 1: {result.degraded_tokens} of 30 tokens lack experts 0, 1, 2, 3, 4, 5, 6, 7" in warned


def test_the_synchronous_twin_finds_servers_too() -> None:
    with pytest.raises(ValueError, match="give a list with at least one host:port"):
        SyncCoordinator("node0:50051")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"on_missing": "zero"}, "on_missing is 'zero'; choose from error, renormalize"),
        ({"hedge_quantile": 1.0}, "hedge_quantile is 1.0; it must be from 0.5 to below 1"),
        ({"retry_ratio": -1.0}, "retry_ratio is -1.0; it must not be negative"),
        ({"call_timeout": math.inf}, "call_timeout is inf; it must be at most 1000000000 seconds"),
        ({"attempt_timeout": math.inf}, "attempt_timeout is inf; it must be at most 1000000000 seconds"),
        ({"attempt_timeout": math.nan}, "attempt_timeout is nan; it must be at most"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        CoordinatorConfig(**options)
