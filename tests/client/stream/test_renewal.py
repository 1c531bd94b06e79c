"""Stream-ordered calls that go to others than before."""

import asyncio
import gc
import time
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from expertd.client.coordinator import Coordinator
from expertd.client.placement.admin import update_shard
from expertd.client.stream import calls
from expertd.client.stream.tables import Tables
from expertd.client.transport.gpu_room import GpuRoom
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import ExpertdError, InvalidBatch, Overloaded, Unavailable
from expertd.server.admin.service import AdminDoor
from expertd.server.app import Server
from expertd.server.local.door import LocalDoor
from tests.support.coordinators import EXACT, EXPERTS, LAYER, on_stream, routing, tokens
from tests.support.fence.markers import no_gpu
from tests.support.fleets import HALVES, addresses, running_servers
from tests.support.serving import ANY_PORT, door, running_server

pytestmark = no_gpu

ALL = range(EXPERTS)
HIDDEN_STATES = tokens(2).float()
IDS, WEIGHTS = routing(2)
LONGEST_SECONDS = 60.0


async def own(server: Server, experts: Iterable[int]) -> None:
    owned = tuple(experts)
    wanted = dict.fromkeys(server.shard.experts, owned)
    address = str(door(server, AdminDoor).address)
    async for _ in update_shard(address, ClientSecurity(), server.info.placement_epoch, wanted):
        pass


async def test_calls_follow_experts_that_move(small_model: Path) -> None:
    """Although nobody makes other calls."""
    async with (
        running_servers(small_model, HALVES, admin_listen=ANY_PORT) as (low, high),
        Coordinator(addresses([low, high]), EXACT) as moe,
    ):
        await moe.prepare_stream(8, "cpu", timeout=20.0)
        expected = await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS)
        await moe.check()
        await own(high, ALL)
        await own(low, [0])
        assert (await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS)).isnan().all()
        with pytest.raises(ExpertdError, match=f"{low.address}: layer {LAYER}: "):
            await moe.check()
        end = time.monotonic() + LONGEST_SECONDS
        while True:
            try:
                got = await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS)
                await moe.check()
                break
            except ExpertdError:
                assert time.monotonic() < end
                await asyncio.sleep(0.1)
        # Sums are added in another order.
        assert relative_error(got, expected) < 1e-5


async def test_what_failed_before_is_told_after(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], EXACT) as moe:
        await moe.prepare_stream(8, "cpu", timeout=20.0)
        await on_stream(moe, HIDDEN_STATES, IDS, torch.full_like(WEIGHTS, torch.inf))
        await moe.stream_calls.renew()
        with pytest.raises(InvalidBatch, match="is inf"):
            await moe.check()
        await moe.check()


async def test_graphs_keep_the_tables_that_they_read(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], EXACT) as moe:
        await moe.prepare_stream(8, "cpu", timeout=20.0)
        captured = moe.stream_calls
        assert captured._tables is not None
        read = weakref.ref(captured._tables.places)
        captured._captured = True
        monkeypatch.setattr(Tables, "fit", lambda *_: False)
        await captured.renew()
        gc.collect()
        assert read() is not None
        assert read() is not captured._tables.places


async def test_lanes_are_renewed_where_there_is_no_room_for_both(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], EXACT) as moe:
        await moe.prepare_stream(8, "cpu", timeout=20.0)
        expected = await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS)
        local = door(server, LocalDoor)
        lane_bytes = local.mapped_bytes
        # A process may have half of it.
        monkeypatch.setattr(local._room, "_max_bytes", 3 * lane_bytes)
        await moe.stream_calls.renew()
        assert torch.equal(await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS), expected)
        monkeypatch.setattr(calls, "GIVEN_BACK_SECONDS", 0.2)
        monkeypatch.setattr(local._room, "_max_bytes", lane_bytes)
        with pytest.raises(Overloaded, match="of the half of --shared-memory-bytes"):
            await moe.stream_calls.renew()
        assert (await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS)).isnan().all()
        monkeypatch.setattr(local._room, "_max_bytes", 2 * lane_bytes)
        with pytest.raises(Unavailable):
            await moe.check()
        assert torch.equal(await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS), expected)
        await moe.check()


class Memory:
    """In GPU memory's place."""

    size = 1 << 20


async def test_gpu_memory_that_is_released_is_kept_by_nobody(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], EXACT) as moe:
        await moe.prepare_stream(8, "cpu", timeout=20.0)
        (lane,) = moe.stream_calls._lanes
        memory = Memory()
        held = weakref.ref(memory)
        lane._gpu = memory  # type: ignore[assignment]
        lane._segment._gpu = GpuRoom(memory)  # type: ignore[arg-type]
        del memory
        lane.release_gpu()
        gc.collect()
        assert held() is None
