"""What a call took is free as soon as nobody has its result: Python need not look for rings of references."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.sync import SyncCoordinator
from tests.support.coordinators import LAYER, QUICK, call, routing, tokens
from tests.support.serving import running_server, until

ALL = range(16)
CONFIGS = pytest.mark.parametrize("config", [QUICK, replace(QUICK, shared_memory_bytes=0)], ids=["lanes", "messages"])


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def call_here(moe: SyncCoordinator) -> weakref.ref[Tensor]:
    ids, weights = routing(20)
    return weakref.ref(moe(LAYER, tokens(20), topk_ids=ids, topk_weights=weights))


@CONFIGS
@pytest.mark.parametrize("long_elements", [0, 1 << 20], ids=["beside", "on-loop"])
async def test_what_an_awaited_call_took_goes_with_its_output(
    small_model: Path, config: CoordinatorConfig, long_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd.client.call.routed.LONG_ELEMENTS", long_elements)
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], config) as moe:
        with no_collector():
            output = weakref.ref(await call(moe))
            await until(lambda: output() is None)


@CONFIGS
async def test_what_a_call_on_a_thread_took_goes_with_its_output(small_model: Path, config: CoordinatorConfig) -> None:
    async with running_server(small_model, ALL) as server:
        moe = SyncCoordinator([str(server.address)], config)
        await asyncio.to_thread(moe.connect)
        with no_collector():
            output = await asyncio.to_thread(call_here, moe)
            await until(lambda: output() is None)
        await asyncio.to_thread(moe.close)
