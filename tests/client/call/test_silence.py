"""A replica that is frozen is left within two seconds, at default settings, however it is reached."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.sync import SyncCoordinator
from expertd.client.tools.cluster import LocalCluster
from expertd.kernels.oracle.reference import relative_error
from tests.support.coordinators import LAYER, expected, routing, tokens

DEFAULT = CoordinatorConfig()
WAYS = {"shared-memory": DEFAULT, "grpc": replace(DEFAULT, shared_memory_bytes=0)}
CALLERS = 4
TOLERANCE = 0.1
"""FP8 both ways; a sum without a replica's experts is off by more."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("on_loop", [True, False], ids=["loop", "thread"])
async def test_a_frozen_replica_costs_callers_two_seconds_once(small_model: Path, way: str, on_loop: bool) -> None:
    right = expected(small_model)
    ids, weights = routing(20)
    async with LocalCluster(small_model, ["0-15", "0-15"], ["--threads", "1"]) as cluster:
        moe = SyncCoordinator(cluster.addresses, WAYS[way])
        await asyncio.to_thread(moe.connect)
        calls: list[tuple[float, float]] = []
        over = asyncio.Event()

        async def output() -> torch.Tensor:
            if on_loop:
                call = moe._coordinator(LAYER, tokens(20), topk_ids=ids, topk_weights=weights)
                return await asyncio.to_thread(moe._running().wait, call)
            return await asyncio.to_thread(moe, LAYER, tokens(20), topk_ids=ids, topk_weights=weights)

        async def keep_calling() -> None:
            while not over.is_set():
                began = time.monotonic()
                assert relative_error(await output(), right) < TOLERANCE
                calls.append((began, time.monotonic()))

        callers = [asyncio.create_task(keep_calling()) for _ in range(CALLERS)]
        await asyncio.sleep(1.0)
        frozen_at = time.monotonic()
        victim = cluster._processes[0]
        os.kill(victim.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(4.0)
        finally:
            os.kill(victim.pid, signal.SIGCONT)
        over.set()
        await asyncio.gather(*callers)
        await asyncio.to_thread(moe.close)
        assert min(began for began, _ in calls) < frozen_at
        longest = max(ended - began for began, ended in calls)
        print(f"{way}: {len(calls)} calls, the longest took {longest:.2f} s")
        assert longest < 2.5
        assert sum(began > frozen_at + 2.5 for began, _ in calls) > CALLERS


@pytest.mark.parametrize("way", WAYS)
async def test_a_frozen_replica_that_thaws_is_used_again(small_model: Path, way: str) -> None:
    ids, weights = routing(20)
    async with LocalCluster(small_model, ["0-7", "8-15"]) as cluster, Coordinator(cluster.addresses, WAYS[way]) as moe:
        assert (await moe(LAYER, tokens(20), topk_ids=ids, topk_weights=weights)).isfinite().all()
        os.kill(cluster._processes[1].pid, signal.SIGSTOP)
        calling = asyncio.create_task(moe(LAYER, tokens(20), topk_ids=ids, topk_weights=weights))
        await asyncio.sleep(0.5)
        os.kill(cluster._processes[1].pid, signal.SIGCONT)
        assert relative_error(await calling, expected(small_model)) < TOLERANCE


async def test_an_event_loop_that_stands_still_is_no_silence_of_servers(small_model: Path) -> None:
    ids, weights = routing(20)
    async with LocalCluster(small_model, ["0-15"]) as cluster, Coordinator(cluster.addresses) as moe:
        member = moe._connected().membership.members[0]
        for _ in range(3):
            await asyncio.sleep(0.3)
            # As a caller does who computes something else on it.
            time.sleep(2.5)
            await asyncio.sleep(0.05)
            assert member.in_use
        assert (await moe(LAYER, tokens(20), topk_ids=ids, topk_weights=weights)).isfinite().all()
