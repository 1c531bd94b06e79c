"""Servers that die, return, refuse or answer late: every pair once, or an error."""

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import DeadlineExceeded, Overloaded, ServerFault, StalePlacement, Unavailable
from expertd.server.options.config import Address
from expertd.server.rpc.incoming import Incoming
from tests.support.coordinators import LAYER, QUICK, call, expected, oracle, tokens
from tests.support.fleets import addresses, computed_tokens, flat, running_replicas, stop
from tests.support.serving import Answers, running_server

OVER_GRPC = replace(QUICK, shared_memory_bytes=0)
"""Where `Answers` are."""


async def test_calls_go_on_without_an_error_while_a_replica_stops(small_model: Path) -> None:
    async with running_replicas(small_model) as replicas, Coordinator(flat(replicas), QUICK) as moe:
        right = expected(small_model)
        stopping: asyncio.Task[None] | None = None
        for number in range(40):
            if number == 10:
                stopping = asyncio.create_task(stop(replicas[0][0]))
            outputs = await asyncio.gather(*(call(moe) for _ in range(4)))
            assert all(relative_error(output, right) < 1e-5 for output in outputs)
        assert stopping is not None
        await stopping
        assert computed_tokens(replicas[0][1]) > 0


async def test_without_an_owner_the_error_names_the_experts_and_calls_for_others_go_on(small_model: Path) -> None:
    async with running_replicas(small_model, count=1) as replicas, Coordinator(flat(replicas), QUICK) as moe:
        await stop(replicas[0][0])
        one = torch.ones(1, 1)
        nobody = r"^layer 1: no server that can be reached owns expert 3; out of use: 127\.0\.0\.1:\d+: "
        with pytest.raises(Unavailable, match=nobody):
            await moe(LAYER, tokens(1), topk_ids=torch.tensor([[3]]), topk_weights=one)
        output = await moe(LAYER, tokens(1), topk_ids=torch.tensor([[9]]), topk_weights=one)
        assert relative_error(output, oracle(small_model, tokens(1), torch.tensor([[9]]), one)) < 1e-5


async def test_a_server_that_returns_is_used_again_within_two_seconds(small_model: Path) -> None:
    async with running_server(small_model, range(16)) as first, Coordinator(addresses([first]), QUICK) as moe:
        await call(moe)
        await stop(first)
        with pytest.raises(Unavailable):
            await call(moe)
        again = Address("127.0.0.1", first.address.port)
        async with running_server(small_model, range(16), listen=again):
            started = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() - started < 2:
                with contextlib.suppress(Unavailable):
                    assert relative_error(await call(moe), expected(small_model)) < 1e-5
                    break
            else:
                pytest.fail("the server was back for two seconds and not used")


async def test_a_server_that_returns_with_other_experts_is_asked_for_those(small_model: Path) -> None:
    async with (
        running_server(small_model, range(16)) as everything,
        running_server(small_model, range(8)) as changing,
        Coordinator(addresses([everything, changing]), QUICK) as moe,
    ):
        await stop(changing)
        for seed in range(3):
            await call(moe, seed)
        async with running_server(
            small_model, range(8, 16), listen=Address("127.0.0.1", changing.address.port)
        ) as back:
            for _ in range(100):
                outputs = await asyncio.gather(*(call(moe, seed) for seed in range(4)))
                for seed, output in enumerate(outputs):
                    assert relative_error(output, expected(small_model, seed)) < 1e-5
                if computed_tokens(back):
                    break
            else:
                pytest.fail("the server that returned was never asked")


async def test_a_missing_replica_at_the_start_is_found_later(small_model: Path) -> None:
    async with running_server(small_model, range(16)) as first:
        async with running_server(small_model, range(16)) as placeholder:
            address = placeholder.address
        async with Coordinator([str(address), str(first.address)], QUICK) as moe:
            await call(moe)
            async with running_server(small_model, range(16), listen=address) as late:
                for _ in range(300):
                    await asyncio.gather(*(call(moe) for _ in range(4)))
                    if computed_tokens(late):
                        break
                else:
                    pytest.fail("the late replica was never asked")


async def test_idle_replicas_share_concurrent_calls(small_model: Path) -> None:
    async with running_replicas(small_model) as replicas, Coordinator(flat(replicas), QUICK) as moe:
        await asyncio.gather(*(call(moe, seed) for seed in range(20)))
        assert all(computed_tokens(server) > 0 for half in replicas for server in half)


async def test_an_overloaded_replica_is_passed_over_and_stays_in_use(small_model: Path) -> None:
    async with running_replicas(small_model) as replicas, Coordinator(flat(replicas), OVER_GRPC) as moe:

        async def refuse(*_: object) -> bytes:
            raise Overloaded("99 tokens are queued")

        full = replicas[0][0]
        answers = Answers(full, refuse)
        for seed in range(8):
            assert relative_error(await call(moe, seed), expected(small_model, seed)) < 1e-5
        answers.leave()
        await asyncio.gather(*(call(moe, seed) for seed in range(8)))
        assert computed_tokens(full) > 0


async def test_a_server_that_fails_is_replaced_by_its_replica(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_replicas(small_model) as replicas, Coordinator(flat(replicas), OVER_GRPC) as moe:

        async def fail(*_: object) -> bytes:
            raise ServerFault("the device failed: RuntimeError: CUDA error")

        for half in replicas:
            Answers(half[0], fail)
        for seed in range(10):
            assert relative_error(await call(moe, seed), expected(small_model, seed)) < 1e-5


async def test_a_server_that_hangs_costs_one_attempt(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(OVER_GRPC, attempt_timeout=0.2)
    async with running_replicas(small_model) as replicas, Coordinator(flat(replicas), config) as moe:

        async def hang(*_: object) -> bytes:
            await asyncio.Event().wait()
            raise AssertionError

        Answers(replicas[0][0], hang)
        started = asyncio.get_running_loop().time()
        assert relative_error(await call(moe), expected(small_model)) < 1e-5
        assert asyncio.get_running_loop().time() - started < 2


async def test_the_callers_own_time_limit_takes_no_server_out_of_use(small_model: Path) -> None:
    hurried = replace(QUICK, call_timeout=0.001)
    async with running_server(small_model, range(16)) as server, Coordinator(addresses([server]), hurried) as moe:
        with pytest.raises(DeadlineExceeded):
            await call(moe, count=3000)
        assert moe.backends == {"torch"}


async def test_attempts_are_bounded(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = 0

    async def refuse(*_: object) -> bytes:
        nonlocal attempts
        attempts += 1
        raise Overloaded("always full")

    async with running_server(small_model, range(16)) as server:
        Answers(server, refuse)
        async with Coordinator(addresses([server]), replace(OVER_GRPC, max_attempts=3)) as moe:
            with pytest.raises(Overloaded, match="always full"):
                await call(moe)
    assert attempts == 3


async def test_placements_that_change_again_and_again_cost_no_attempts(small_model: Path) -> None:
    changes = 0

    async def change(incoming: Incoming) -> bytes:
        nonlocal changes
        if changes == 6:
            return await answers.real(incoming)
        changes += 1
        raise StalePlacement("placement_epoch is 1; the current one is 2")

    async with running_server(small_model, range(16)) as server:
        answers = Answers(server, change)
        async with Coordinator(addresses([server]), replace(OVER_GRPC, max_attempts=3)) as moe:
            assert relative_error(await call(moe), expected(small_model)) < 1e-5
    assert changes == 6


@pytest.mark.parametrize("field", ["call_timeout", "attempt_timeout", "connect_timeout", "max_attempts"])
def test_limits_must_be_positive(field: str) -> None:
    limits: dict[str, Any] = {field: 0}
    with pytest.raises(ValueError, match=f"{field} is 0; it must be greater than 0"):
        CoordinatorConfig(**limits)
