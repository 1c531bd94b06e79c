"""Calls that are begun by one line and collected by another."""

from __future__ import annotations

import asyncio
import gc
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.sync import SyncCoordinator
from expertd.client.telemetry.metrics import CoordinatorMetrics
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.proto.base.errors import Cancelled, InvalidBatch, Unavailable, UnknownExpert
from tests.support.coordinators import LAYER, QUICK, call, free_bytes, routing, segments_of, tokens
from tests.support.serving import Gate, running_server, until

ALL = range(16)
CONFIGS = [QUICK, replace(QUICK, shared_memory_bytes=0)]
LONG_WAY = replace(QUICK, hedge_quantile=0.99)
NAMES = ["shared-memory", "grpc"]


def choices(seed: int = 0, count: int = 20) -> dict[str, torch.Tensor]:
    ids, weights = routing(count, seed)
    return {"topk_ids": ids, "topk_weights": weights}


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
async def test_calls_are_under_way_before_they_are_awaited(small_model: Path, config: CoordinatorConfig) -> None:
    registry = CollectorRegistry()
    counted = replace(config, metrics=CoordinatorMetrics(registry))
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], counted) as moe:
        right = [await call(moe, seed) for seed in range(3)]
        gate = Gate(server)
        tasks = [moe.submit(LAYER, tokens(20, seed), **choices(seed)) for seed in range(3)]
        await until(lambda: bool(gate.reached))
        assert not any(task.done() for task in tasks)
        gate.open()
        for task, output in zip(reversed(tasks), reversed(right), strict=True):
            assert torch.equal((await task).output, output)
        assert registry.get_sample_value("expertd_coordinator_calls_total", {"outcome": "ok"}) == 6


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
async def test_a_thread_collects_what_it_began(small_model: Path, config: CoordinatorConfig) -> None:
    async with running_server(small_model, ALL) as server:
        moe = SyncCoordinator([str(server.address)], config)
        await asyncio.to_thread(moe.connect)
        right = await asyncio.to_thread(moe, LAYER, tokens(20), **choices())
        gate = Gate(server)
        pending = [moe.submit(LAYER, tokens(20), **choices()) for _ in range(2)]
        await until(lambda: bool(gate.reached))
        gate.open()
        for one in reversed(pending):
            result = await asyncio.to_thread(one.result)
            assert torch.equal(result.output, right)
            assert one.result() is result
        await asyncio.to_thread(moe.close)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
async def test_closing_fails_the_calls_that_other_threads_wait_for(
    small_model: Path, config: CoordinatorConfig
) -> None:
    async with running_server(small_model, ALL) as server:
        moe = SyncCoordinator([str(server.address)], config)
        await asyncio.to_thread(moe.connect)
        gate = Gate(server)
        calling = asyncio.ensure_future(asyncio.to_thread(moe, LAYER, tokens(20), **choices()))
        await until(lambda: bool(gate.reached))
        await asyncio.to_thread(moe.close)
        with pytest.raises((Unavailable, RuntimeError), match=r"closed|not connected"):
            await asyncio.wait_for(calling, 10)
        gate.open()


async def test_what_nobody_collects_is_cancelled(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        moe = SyncCoordinator([str(server.address)], QUICK)
        await asyncio.to_thread(moe.connect)
        members = moe._coordinator._connected().membership.members
        transport = members[0].transport
        assert isinstance(transport, SharedMemoryTransport)
        gate = Gate(server)
        first = moe.submit(LAYER, tokens(20), **choices())
        await until(lambda: bool(gate.reached))
        second = moe.submit(LAYER, tokens(20), **choices())
        await until(lambda: server.executor.engine.queued_tokens == 20)
        assert members[0].outstanding_tokens == 40
        del second
        gc.collect()
        await until(lambda: server.executor.engine.queued_tokens == 0)
        first.cancel()
        assert members[0].outstanding_tokens == 0
        gate.open()
        await until(lambda: all(free_bytes(segment) == segment.size for segment in segments_of(transport)))
        with pytest.raises(Cancelled, match="by its caller"):
            first.result()
        await asyncio.to_thread(moe.close)


async def test_a_call_may_be_let_go_by_a_thread_that_holds_locks(small_model: Path) -> None:
    """As by the garbage collector, which runs anywhere."""
    metrics = CoordinatorMetrics(CollectorRegistry())
    async with running_server(small_model, ALL) as server:
        moe = SyncCoordinator([str(server.address)], replace(QUICK, metrics=metrics))
        await asyncio.to_thread(moe.connect)
        caller, gate = moe._coordinator._connected(), Gate(server)
        pending = [moe.submit(LAYER, tokens(20), **choices())]

        def let_go() -> None:
            attempts = metrics.attempts
            with caller._counting, moe._running()._ending, attempts._lock, attempts._seconds._lock:
                pending.clear()

        thread = threading.Thread(target=let_go, daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, 20)
        assert not thread.is_alive()
        await until(lambda: caller.membership.members[0].outstanding_tokens == 0)
        gate.open()
        await asyncio.to_thread(moe.close)


@pytest.mark.parametrize("config", [*CONFIGS, LONG_WAY], ids=[*NAMES, "long"])
async def test_a_call_is_cancelled_while_another_thread_waits_for_it(
    small_model: Path, config: CoordinatorConfig
) -> None:
    registry = CollectorRegistry()
    patient = replace(config, attempt_timeout=600.0, call_timeout=600.0, metrics=CoordinatorMetrics(registry))
    async with running_server(small_model, ALL) as server:
        moe = SyncCoordinator([str(server.address)], patient)
        await asyncio.to_thread(moe.connect)
        member = moe._coordinator._connected().membership.members[0]
        gate = Gate(server)
        pending = moe.submit(LAYER, tokens(20), **choices())
        waiting = asyncio.create_task(asyncio.to_thread(pending.result))
        await until(lambda: bool(gate.reached) and pending._collecting.locked())
        pending.cancel()
        with pytest.raises(Cancelled, match="by its caller"):
            await asyncio.wait_for(waiting, 20)
        await until(lambda: member.outstanding_tokens == 0 and not member.under_way)
        assert member.in_use
        assert registry.get_sample_value("expertd_coordinator_calls_total", {"outcome": "cancelled"}) == 1
        gate.open()
        await asyncio.to_thread(moe.close)


async def test_a_task_that_is_cancelled_before_it_begins_leaves_nothing(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], QUICK) as moe:
        member = moe._connected().membership.members[0]
        task = moe.submit(LAYER, tokens(20), **choices())
        assert member.outstanding_tokens == 20
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert member.outstanding_tokens == 0
        assert (await call(moe)).isfinite().all()


async def test_wrong_arguments_are_errors_at_once(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], QUICK) as moe:
        with pytest.raises(InvalidBatch, match=r"^hidden is "):
            moe.submit(LAYER, torch.zeros(3, 7), **choices())
        with pytest.raises(UnknownExpert, match="layer 99 is on no server"):
            moe.submit(99, tokens(20), **choices())
