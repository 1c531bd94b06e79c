"""Coordinators and servers that share memory: the same bits as over gRPC, and gRPC where there is no room."""

import asyncio
import contextlib
import gc
import logging
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.security import ClientSecurity
from expertd.client.transport.segment_pool import FIRST_PAUSE
from expertd.client.transport.shared_memory import HOST, SharedMemoryTransport
from expertd.kernels.numerics.backend import Underway
from expertd.kernels.numerics.tokens import count_pairs
from expertd.proto.base.errors import DeadlineExceeded, InvalidBatch, Unavailable
from expertd.proto.codec import ExecuteCall, ExecuteResult, Registration
from expertd.proto.lane.layout import LANE_VERSION
from expertd.server.local.door import LocalDoor
from tests.support.coordinators import EXACT, LAYER, free_bytes, routing, segments_of, tokens
from tests.support.serving import Gate, call_for, door, random_batch, running_server, until

ALL = range(16)
DEFAULT = CoordinatorConfig()
# H 256, top 4, bfloat16 both ways: 1 token takes 1152 bytes, 40 tokens 42 KB.


async def call(moe: Coordinator, count: int, seed: int = 0) -> Tensor:
    ids, weights = routing(count, seed)
    return await moe(LAYER, tokens(count, seed), topk_ids=ids, topk_weights=weights)


class Noting(GrpcTransport):
    """Notes what goes over gRPC although memory is shared, in tokens."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.sent: list[int] = []

    async def execute(self, call: ExecuteCall) -> ExecuteResult:
        self.sent.append(len(call.hidden))
        return await super().execute(call)


def transport_of(moe: Coordinator) -> SharedMemoryTransport:
    transport = next(iter(moe._connected().membership.members.values())).transport
    assert isinstance(transport, SharedMemoryTransport)
    return transport


@pytest.mark.parametrize("config", [DEFAULT, EXACT], ids=["float8", "bfloat16"])
async def test_results_are_those_of_grpc_bit_for_bit(small_model: Path, config: CoordinatorConfig) -> None:
    async with (
        running_server(small_model, ALL, max_tokens_per_request=500) as server,
        Coordinator([str(server.address)], replace(config, shared_memory_bytes=0)) as over_grpc,
        Coordinator([str(server.address)], config) as shared,
        Coordinator([str(server.address)], replace(config, shared_memory_chunk_bytes=50_000)) as split,
    ):
        assert over_grpc.sharing_memory == frozenset()
        assert shared.sharing_memory == split.sharing_memory == {str(server.address)}
        for count in (1, 40, 1300):
            expected = await call(over_grpc, count)
            assert torch.equal(await call(shared, count), expected)
            assert torch.equal(await call(split, count), expected)


async def test_with_a_token_and_over_a_unix_socket(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("first-secret")
    path = tmp_path / "expertd.sock"
    config = replace(DEFAULT, security=ClientSecurity(token="first-secret"))
    options = {"auth_token_file": tmp_path / "tokens", "unix_socket": path}
    async with running_server(small_model, ALL, **options), Coordinator([f"unix:{path}"], config) as moe:
        assert moe.sharing_memory == {f"unix:{path}"}
        assert (await call(moe, 3)).isfinite().all()


async def test_many_calls_at_once_use_slots_again_and_memory_grows_as_needed(small_model: Path) -> None:

    def small(address: str) -> SharedMemoryTransport:
        return SharedMemoryTransport(GrpcTransport(address), 256 << 10, first_bytes=64 << 10)

    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], replace(DEFAULT, shared_memory_bytes=0)) as over_grpc,
        Coordinator([str(server.address)], open_transport=small) as moe,
    ):
        expected = [await call(over_grpc, 40, seed) for seed in range(20)]
        for _ in range(5):
            results = await asyncio.gather(*(call(moe, 40, seed) for seed in range(20)))
            assert all(torch.equal(result, right) for result, right in zip(results, expected, strict=True))
        assert door(server, LocalDoor).mapped_bytes == 256 << 10
        segments = segments_of(transport_of(moe))
        assert [segment.size >> 10 for segment in segments] == [64, 64, 128]
        assert [free_bytes(segment) for segment in segments] == [segment.size for segment in segments]


async def test_calls_without_room_go_over_grpc(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, contextlib.AsyncExitStack() as stack:
        grpc = Noting(str(server.address))
        shared = SharedMemoryTransport(grpc, 16 << 10)
        over_grpc = await stack.enter_async_context(Coordinator([grpc.address], open_transport=GrpcTransport))
        moe = await stack.enter_async_context(Coordinator([grpc.address], open_transport=lambda _: shared))
        expected = await call(over_grpc, 300)
        await call(moe, 2)
        assert torch.equal(await call(moe, 300), expected)
        assert grpc.sent == [300]


@pytest.mark.parametrize(
    ("options", "level", "reason"),
    [
        ({"shared_memory_bytes": 0}, logging.INFO, "this server shares no memory; start it with --shared-memory-bytes"),
        ({"shared_memory_bytes": 4096}, logging.WARNING, "the segment has 16777216 bytes; 4096 are left"),
    ],
    ids=["off", "no room"],
)
async def test_where_memory_is_refused_calls_go_over_grpc_and_the_log_says_why(
    small_model: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], level: int, reason: str
) -> None:
    caplog.set_level(logging.INFO, "expertd.client")
    async with running_server(small_model, ALL, **options) as server, Coordinator([str(server.address)]) as moe:
        assert moe.sharing_memory == frozenset()
        assert (await call(moe, 3)).isfinite().all()
        said = [record for record in caplog.records if record.name == "expertd.client.transport.segment_pool"]
        assert [record.levelno for record in said] == [level]
        assert f"{server.address}: no memory is shared, calls go over gRPC: " in said[0].message
        assert reason in said[0].message


async def test_a_server_without_room_is_asked_again_later(small_model: Path) -> None:
    now = 1000.0
    asked = []

    class Asking(GrpcTransport):
        async def register_shared_memory(self, timeout: float, gpu: str = "") -> Registration:
            asked.append(now)
            return await super().register_shared_memory(timeout, gpu)

    options = {"shared_memory_bytes": 128 << 10}
    async with running_server(small_model, ALL, **options) as server, contextlib.AsyncExitStack() as stack:
        # All that a process may have, and then some.
        first, second = (
            SharedMemoryTransport(Asking(str(server.address)), 64 << 10, first_bytes=64 << 10, clock=lambda: now)
            for _ in range(2)
        )
        for transport in (first, second):
            stack.push_async_callback(transport.close)
            await transport.get_shard(5.0)
        assert [len(transport.shared_devices) for transport in (first, second)] == [1, 0]
        one = call_for(server, random_batch(1, 256, 16, 4))
        for seconds in (0.0, FIRST_PAUSE - 1, 1.5, FIRST_PAUSE, FIRST_PAUSE - 1):
            now += seconds
            await second.execute(one)
        assert asked == [1000.0, 1000.0, 1000.5 + FIRST_PAUSE]
        await first.close()
        await until(lambda: door(server, LocalDoor).mapped_bytes == 0)
        now += 2 * FIRST_PAUSE
        await second.execute(one)
        assert second.shared_devices == {HOST}


async def test_lanes_of_another_version_are_not_spoken(small_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "expertd.client")

    class Newer(GrpcTransport):
        async def register_shared_memory(self, timeout: float, gpu: str = "") -> Registration:
            registration = await super().register_shared_memory(timeout, gpu)
            registration.lane_version = LANE_VERSION + 1
            return registration

    def newer(address: str) -> SharedMemoryTransport:
        return SharedMemoryTransport(Newer(address), 1 << 30)

    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], open_transport=newer) as moe,
    ):
        assert moe.sharing_memory == frozenset()
        assert (await call(moe, 3)).isfinite().all()
    assert f"the server's lanes are of version {LANE_VERSION + 1}; this caller's are of {LANE_VERSION}" in caplog.text


async def test_a_request_that_is_too_long_for_its_slot_goes_over_grpc(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        grpc = Noting(str(server.address))
        transport = await shared_transport(grpc)
        expected = await transport.execute(call_for(server, random_batch(8, 256, 16, 4)))
        long = call_for(server, random_batch(8, 256, 16, 4), traceparent="0" * 600)
        assert torch.equal((await transport.execute(long)).partials, expected.partials)
        assert grpc.sent == [8]
        await until(lambda: free_bytes(segments_of(transport)[0]) == segments_of(transport)[0].size)
        await transport.close()


async def test_a_call_that_is_given_up_is_taken_off_the_servers_queue_and_its_slot_used_again(
    small_model: Path,
) -> None:
    async with running_server(small_model, ALL) as server:
        transport = await shared_transport(GrpcTransport(str(server.address)))
        segment = segments_of(transport)[0]
        gate = Gate(server)
        computing = asyncio.create_task(transport.execute(call_for(server, random_batch(8, 256, 16, 4))))
        await until(lambda: bool(gate.reached))
        given_up = asyncio.create_task(transport.execute(call_for(server, random_batch(8, 256, 16, 4), layer=2)))
        await until(lambda: server.engine.queued_tokens == 8)
        given_up.cancel()
        await until(lambda: server.engine.queued_tokens == 0)
        await until(lambda: len(segment._watched) == 1)
        gate.open()
        del given_up
        assert (await computing).partials.isfinite().all()
        del computing
        await until(lambda: free_bytes(segment) == segment.size)
        await transport.close()


async def test_a_lane_that_the_server_ends_fails_its_calls_with_the_reason(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        transport = await shared_transport(GrpcTransport(str(server.address)))
        gate = Gate(server)
        waiting = asyncio.create_task(transport.execute(call_for(server, random_batch(8, 256, 16, 4))))
        await until(lambda: bool(gate.reached))
        segment = segments_of(transport)[0]
        segment.memory[64:68] = (1 << 30).to_bytes(4, "little")  # its tail
        # Whatever wakes the server; it looks at the lane then.
        grpc = GrpcTransport(str(server.address))
        asking = asyncio.create_task(grpc.execute(call_for(server, random_batch(8, 256, 16, 4))))
        with pytest.raises(InvalidBatch, match=rf"^{server.address}: "):
            await waiting
        gate.open()
        await asking
        await asyncio.gather(transport.close(), grpc.close())


async def test_a_socket_that_cannot_be_reached_falls_back_too(
    small_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_server(small_model, ALL) as server:
        server.handlers.tickets._name = "@expertd-elsewhere"
        async with Coordinator([str(server.address)]) as moe:
            assert moe.sharing_memory == frozenset()
            assert (await call(moe, 3)).isfinite().all()
    assert "calls go over gRPC: [Errno 111] Connection refused" in caplog.text


async def shared_transport(grpc: GrpcTransport) -> SharedMemoryTransport:
    transport = SharedMemoryTransport(grpc, 1 << 20)
    await transport.get_shard(5.0)
    assert HOST in transport.shared_devices
    return transport


async def test_a_call_in_several_requests_fits_where_it_went_in_one(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        transport = SharedMemoryTransport(GrpcTransport(str(server.address)), 16 << 20, 1 << 17, first_bytes=1 << 16)
        await transport.get_shard(5.0)
        large = call_for(server, random_batch(600, 256, 16, 4))
        expected = (await transport._execute_in_slot(large, None)).partials.clone()
        result = await asyncio.to_thread(transport.call, large)
        assert result is not None
        assert torch.allclose(result.partials.float(), expected.float(), rtol=1e-2, atol=1e-4)
        assert result.receipt == count_pairs(large.expert_ids)
        await transport.close()


async def test_a_slot_is_the_servers_until_it_has_answered_even_when_nobody_waits(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        transport = await shared_transport(GrpcTransport(str(server.address)))
        segment = segments_of(transport)[0]
        gate = Gate(server)
        with pytest.raises(DeadlineExceeded, match=rf"^{server.address}: no answer within 0\.1 s"):
            await transport.execute(call_for(server, random_batch(8, 256, 16, 4), timeout=0.1))
        # Neither the event loop nor the error's traceback must be what keeps the slot.
        await asyncio.sleep(0.05)
        gc.collect()
        assert free_bytes(segment) < segment.size
        gate.open()
        await until(lambda: free_bytes(segment) == segment.size)
        await transport.close()


async def test_a_slot_is_the_callers_while_the_partials_are_in_use(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        transport = await shared_transport(GrpcTransport(str(server.address)))
        segment = segments_of(transport)[0]
        first = await transport._execute_in_slot(call_for(server, random_batch(8, 256, 16, 4)), None)
        kept, copy = first.partials[3:], first.partials[3:].clone()
        del first
        for seed in range(20):
            await transport.execute(call_for(server, random_batch(8, 256, 16, 4, seed=seed)))
        assert torch.equal(kept, copy)
        assert free_bytes(segment) < segment.size
        del kept
        await asyncio.sleep(0)  # The event loop holds the last answer until its next turn.
        assert free_bytes(segment) == segment.size
        await transport.close()


async def test_sums_of_many_tokens_stay_where_they_come(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, asyncio.timeout(30):
        over_grpc = GrpcTransport(str(server.address))
        # In five requests each, whose sums follow each other.
        transport = SharedMemoryTransport(
            GrpcTransport(over_grpc.address), 8 << 20, chunk_bytes=60_000, first_bytes=2 << 20
        )
        await transport.get_shard(5.0)
        (segment,) = segments_of(transport)
        memory = torch.frombuffer(segment.memory, dtype=torch.uint8)
        within = range(memory.data_ptr(), memory.data_ptr() + segment.size)

        def call_of(seed: int) -> ExecuteCall:
            call = call_for(server, random_batch(520, 256, 16, 4, seed=seed))
            return replace(call, request_id=10 * seed, reply_dtype=torch.bfloat16)

        calls = list(map(call_of, range(1, 12)))
        expected = [(await over_grpc.execute(call)).partials for call in calls]
        result: ExecuteResult | None = None
        kept: list[Tensor] = []
        for call, right in zip(calls, expected, strict=True):
            if len(kept) % 2:
                result = await asyncio.to_thread(transport.call, call)
            else:
                result = await transport.execute(call)
            assert result is not None
            assert torch.equal(result.partials, right)
            kept.append(result.partials)
        # As long as there is room for as large a call: who keeps more has copies, and calls still share memory.
        places = [sums.data_ptr() in within for sums in kept]
        assert places == [True] * 5 + [False] * 6
        assert all(torch.equal(sums, right) for sums, right in zip(kept, expected, strict=True)), "nobody else's"
        rest, result = kept[0][-1], None
        kept.clear()
        assert free_bytes(segment) == segment.size - 520 * 512, "one row is left, and with it all"
        del rest
        await asyncio.sleep(0)  # The event loop holds the last answer until its next turn.
        assert all(free_bytes(one) == one.size for one in segments_of(transport))
        await transport.close()
        await over_grpc.close()


async def test_a_call_that_is_dropped_gives_its_sums_room_back_when_it_is_answered(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        transport = SharedMemoryTransport(
            GrpcTransport(str(server.address)), 4 << 20, chunk_bytes=60_000, first_bytes=4 << 20
        )
        await transport.get_shard(5.0)
        (segment,) = segments_of(transport)
        gate = Gate(server)
        call = replace(call_for(server, random_batch(600, 256, 16, 4)), reply_dtype=torch.bfloat16)
        waiting = asyncio.create_task(transport.execute(call))
        await until(lambda: bool(gate.reached))
        taken = segment.size - free_bytes(segment)
        assert taken > 600 * 512
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert segment.size - free_bytes(segment) == taken, "the server may write to all of it"
        gate.open()
        await until(lambda: segment.lane.in_flight == 0 and free_bytes(segment) == segment.size)
        await transport.close()


async def test_a_lost_connection_fails_its_calls_and_is_made_again(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)]) as moe:
        expected = await call(moe, 5)
        transport = transport_of(moe)
        gate = Gate(server)
        waiting = asyncio.create_task(transport.execute(call_for(server, random_batch(8, 256, 16, 4))))
        await until(lambda: bool(gate.reached))
        door(server, LocalDoor).disconnect()
        with pytest.raises(Unavailable, match=rf"^{server.address}: the connection of shared memory was closed"):
            await waiting
        assert HOST not in transport.shared_devices
        gate.open()
        assert torch.equal(await call(moe, 5), expected)
        await transport.get_shard(5.0)
        assert HOST in transport.shared_devices
        assert torch.equal(await call(moe, 5), expected)


async def test_memory_that_a_stuck_device_may_still_write_to_is_not_used_again(small_model: Path) -> None:
    submitted, release = threading.Event(), threading.Event()
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)]) as moe:
        expected = await call(moe, 5)
        transport = transport_of(moe)
        submit = server.device.submit

        def stick(*arguments: Any) -> Underway:  # noqa: ANN401
            submitted.set()
            release.wait(20)
            return submit(*arguments)

        server.device.submit = stick
        waiting = asyncio.create_task(transport.execute(call_for(server, random_batch(8, 256, 16, 4))))
        assert await asyncio.to_thread(submitted.wait, 20)
        server.watchdog._abandon("stuck")
        with pytest.raises(Unavailable, match="the connection of shared memory was closed"):
            await waiting
        assert HOST not in transport.shared_devices
        release.set()
        server.engine.open()
        await transport.get_shard(5.0)
        assert HOST in transport.shared_devices
        assert torch.equal(await call(moe, 5), expected)


async def test_calls_survive_servers_that_stop(small_model: Path) -> None:
    async with (
        running_server(small_model, ALL) as lasting,
        running_server(small_model, ALL) as stopping,
        Coordinator([str(stopping.address), str(lasting.address)]) as moe,
    ):
        assert len(moe.sharing_memory) == 2
        expected = await call(moe, 5)
        for number in range(40):
            if number == 10:
                stopping.stop()
            results = await asyncio.gather(*(call(moe, 5) for _ in range(4)))
            assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"shared_memory_bytes": -1}, "shared_memory_bytes is -1; it must be at least 0"),
        ({"shared_memory_chunk_bytes": 0}, "shared_memory_chunk_bytes is 0; it must be at least 1"),
        ({"spin_us": -1}, "spin_us is -1; it must be at least 0"),
        ({"channels": 0}, "channels is 0; it must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        CoordinatorConfig(**fields)


async def test_a_call_that_ends_late_leaves_the_next_one_in_its_slot_watched(small_model: Path) -> None:
    looks: list[str] = []
    former, latter = partial(looks.append, "former"), partial(looks.append, "latter")
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], DEFAULT) as moe:
        (segment,) = segments_of(transport_of(moe))
        segment.watch(64, former)
        segment.watch(64, latter)
        segment.unwatch(64, former)
        segment.close()
        assert looks == ["latter"]
