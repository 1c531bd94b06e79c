"""Fleets with several models, models that change, and servers that are not there: who is called, and how soon."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.telemetry.metrics import CoordinatorMetrics
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import ModelMismatch, Unavailable, UnknownExpert
from expertd.server.options.config import Address
from tests.support.coordinators import QUICK, call, expected
from tests.support.families import SMALL
from tests.support.fleets import HALVES, addresses, running_servers, stop
from tests.support.process import free_port
from tests.support.serving import running_server, until

ALL = range(16)


@pytest.fixture(scope="module")
def next_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the small model's shape, with other weights."""
    return write_demo_checkpoint(tmp_path_factory.mktemp("next"), replace(SMALL, seed=SMALL.seed + 1))


def fingerprint_of(moe: Coordinator) -> str:
    return moe._connected().membership.holdings.ownership.model_fingerprint


async def test_the_model_of_which_every_expert_has_an_owner_is_called(small_model: Path, next_model: Path) -> None:
    async with (
        running_servers(small_model, HALVES) as whole,
        running_server(next_model, range(8)) as stray,
        Coordinator(addresses([stray, *whole]), QUICK) as moe,
    ):
        for _ in range(3):
            assert relative_error(await call(moe), expected(small_model)) < 1e-5


async def test_of_two_whole_models_the_pinned_one_is_called_and_without_a_pin_none(
    small_model: Path, next_model: Path
) -> None:
    async with running_server(small_model, ALL) as one, running_server(next_model, ALL) as other:
        servers = addresses([one, other])
        with pytest.raises(ModelMismatch, match="holds model"):
            await Coordinator(servers, QUICK).connect()
        async with Coordinator(addresses([other]), QUICK) as moe:
            wanted = fingerprint_of(moe)
        async with Coordinator(servers, replace(QUICK, model_fingerprint=wanted)) as moe:
            assert fingerprint_of(moe) == wanted
            assert relative_error(await call(moe), expected(next_model)) < 1e-5
        with pytest.raises(ModelMismatch, match="model_fingerprint is 'nothing', which no server holds"):
            await Coordinator(servers, replace(QUICK, model_fingerprint="nothing")).connect()


async def test_half_of_another_model_is_no_reason_to_call_half_of_this_one(small_model: Path, next_model: Path) -> None:
    async with running_server(small_model, range(8)) as one, running_server(next_model, range(8, 16)) as other:
        with pytest.raises(ModelMismatch, match="holds model"):
            await Coordinator(addresses([one, other]), QUICK).connect()
        with pytest.raises(UnknownExpert, match="no server owns experts 8, 9"):
            await Coordinator(addresses([one]), QUICK).connect()


@pytest.mark.parametrize("pinned", [False, True], ids=["free", "pinned"])
async def test_a_coordinator_follows_a_fleet_that_changes_its_model_in_place(
    small_model: Path, next_model: Path, pinned: bool
) -> None:
    async with running_servers(small_model, HALVES) as former:
        listen = [Address("127.0.0.1", server.address.port) for server in former]
        moe = await Coordinator(addresses(former), QUICK).connect()
        if pinned:
            config = replace(QUICK, model_fingerprint=fingerprint_of(moe))
            await moe.close()
            moe = await Coordinator(addresses(former), config).connect()
        assert relative_error(await call(moe), expected(small_model)) < 1e-5
        async with running_server(next_model, HALVES[1], listen=await freed(former[1], listen[1])):
            # Half of it is the next model by now, which nobody can use.
            with pytest.raises((Unavailable, ModelMismatch)):
                await call(moe)
            async with running_server(next_model, HALVES[0], listen=await freed(former[0], listen[0])):

                async def right() -> bool:
                    try:
                        return relative_error(await call(moe), expected(next_model)) < 1e-5
                    except (Unavailable, ModelMismatch):
                        return False

                deadline = time.monotonic() + (3 if pinned else 10)
                answered = False
                while not answered and time.monotonic() < deadline:
                    answered = await right()
                    await asyncio.sleep(0.1)
                assert answered != pinned
        await moe.close()


async def test_owners_replaced_by_another_model_are_told_as_that_by_error_log_and_metric(
    small_model: Path, next_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()

    def servers(standing: str) -> float | None:
        return registry.get_sample_value("expertd_coordinator_servers", {"standing": standing})

    config = replace(QUICK, owner_timeout=0.1, metrics=CoordinatorMetrics(registry))
    async with (
        running_servers(small_model, (HALVES[0], HALVES[1], HALVES[1])) as former,
        contextlib.AsyncExitStack() as stack,
    ):
        moe = await stack.enter_async_context(Coordinator(addresses(former), config))
        assert servers("in_use") == 3
        for server in former[1:]:
            await stop(server)
        # Nobody calls: they are missed by who watches them.
        await until(lambda: servers("unavailable") == 2)
        for server in former[1:]:
            listen = Address("127.0.0.1", server.address.port)
            await stack.enter_async_context(running_server(next_model, HALVES[1], listen=listen))
        await until(lambda: servers("another_model") == 2)
        called = fingerprint_of(moe)
        for _ in range(3):
            with pytest.raises(Unavailable) as caught:
                await call(moe)
            for server in former[1:]:
                assert f"{server.address}: it holds another model, '" in str(caught.value)
            assert str(caught.value).count(f"; '{called}' is called") == 2
            assert "SERVING" not in str(caught.value)
        assert servers("in_use") == 1
    assert servers("in_use") == 0
    lines = [record.message for record in caplog.records if "it holds another model" in record.message]
    assert len(lines) == 2


async def freed(server: object, listen: Address) -> Address:
    await stop(server)  # type: ignore[arg-type]
    return listen


async def test_a_dead_address_does_not_keep_a_coordinator_from_connecting(small_model: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        dead = f"127.0.0.1:{silent.getsockname()[1]}"
        async with running_servers(small_model, HALVES) as servers:
            began = time.monotonic()
            moe = await Coordinator([dead, *addresses(servers)], CoordinatorConfig()).connect()
            took = time.monotonic() - began
            assert (await call(moe)).isfinite().all()
            await moe.close()
    print(f"connected in {took:.2f} s")
    # On a machine with other work; who waits for it takes all of `connect_timeout`, 10 s.
    assert took < 6


async def test_who_is_slower_than_needed_joins_later(small_model: Path) -> None:
    async with running_server(small_model, ALL) as first:
        port = free_port()
        async with Coordinator([str(first.address), f"127.0.0.1:{port}"], QUICK) as moe:
            assert len(moe._connected().membership.holdings.known[0]) == 1
            async with running_server(small_model, ALL, listen=Address("127.0.0.1", port)):
                await until(lambda: len(moe._connected().membership.holdings.known[0]) == 2)
                assert relative_error(await call(moe), expected(small_model)) < 1e-5
