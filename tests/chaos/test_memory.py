"""What a server's memory is bounded by, as docs/operations.md has it, and that calls leave nothing behind."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch

from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.interface import Transport
from expertd.client.transport.security import ClientSecurity
from expertd.client.transport.shared_memory import HOST, SharedMemoryTransport
from expertd.proto import codec
from expertd.proto.codec import ExecuteCall, ShardInfo
from expertd.server.rpc.limits import WINDOW_BYTES
from tests.chaos.fleet import Fleet, ServerProcess
from tests.chaos.load import Case, make_cases
from tests.chaos.offers import Offers
from tests.chaos.scale import scaled

WIDE = DemoModel(
    hidden_size=1024,
    moe_intermediate_size=512,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    moe_layers=1,
)
MIB = 1 << 20
TOKENS, BATCH_TOKENS, QUEUED_BYTES, SHARED_BYTES = 256, 1024, 16 * MIB, 64 * MIB
OPTIONS = (
    *("--max-tokens-per-request", str(TOKENS), "--max-batch-tokens", str(BATCH_TOKENS)),
    *("--max-queued-tokens", "100000", "--max-queued-bytes", str(QUEUED_BYTES)),
    *("--shared-memory-bytes", str(SHARED_BYTES)),
)
FACTOR = 10.0
SECONDS = scaled(120.0, 5.0)
ANSWER_RATIO = 2
"""Bytes of an answer for each byte of its request: FP32 for BF16."""
CALLS, WARM_UP_CALLS = scaled((100_000, 10_000), (2_500, 1_000))
MOST_GROWTH = 4 * MIB
NAMES, NAME_BYTES = 24, 4 * MIB


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("wide"), WIDE)


def budget(streams: int, shard: ShardInfo) -> int:
    """Most bytes beyond what the server takes after warming up."""
    sums = WIDE.hidden_size * 4
    batch = BATCH_TOKENS * (WIDE.hidden_size * 2 + 3 * sums)
    held = QUEUED_BYTES * (1 + 2 * ANSWER_RATIO) + streams * (WINDOW_BYTES + 2 * shard.max_message_bytes) + batch
    return held * 3 // 2


async def warm_up(server: ServerProcess, transports: Sequence[Transport], cases: Sequence[Case]) -> ShardInfo:
    """Connect everything and fill a few batches; peaks count from then on."""
    for transport in transports:
        shard = await transport.get_shard(10.0)
    await Offers(transports, shard, cases).peak(1.0, callers=2 * BATCH_TOKENS // TOKENS)
    server.forget_peak()
    return shard


async def test_ten_times_overload_stays_within_the_budget(wide_model: Path, tmp_path: Path) -> None:
    cases = make_cases(wide_model, seed=0, sizes=(TOKENS, 1, TOKENS, 8))
    async with Fleet(wide_model, tmp_path) as fleet:
        server = await fleet.start("0-15", options=OPTIONS)
        remote = [GrpcTransport(server.address) for _ in range(4)]
        shared = [SharedMemoryTransport(GrpcTransport(server.address), SHARED_BYTES // 2) for _ in range(2)]
        transports: list[Transport] = [*remote, *shared]
        shard = await warm_up(server, transports, cases)
        assert all(HOST in transport.shared_devices for transport in shared)
        before = server.peak()
        offers = Offers(transports, shard, cases)
        rate = FACTOR * await offers.peak(scaled(15.0, 3.0), callers=12)
        await offers.flood(rate, SECONDS)
        grown = server.peak() - before
        for transport in transports:
            await transport.close()
    most = budget(len(transports), shard)
    print(
        f"\n{FACTOR:g}x overload for {SECONDS:g} s, {rate:.0f} calls/s offered: {dict(offers.outcomes)},"
        f" {offers.wrong} violations, peak {before >> 20} MiB and {grown >> 20} more; budget {most >> 20} more"
    )
    assert offers.wrong == 0
    assert set(offers.outcomes) == {"ok", "Overloaded"}
    assert 0 < grown < most


async def test_callers_who_read_no_answers_stay_within_the_budget_and_hinder_nobody(
    wide_model: Path, tmp_path: Path
) -> None:
    cases = make_cases(wide_model, seed=0, sizes=(TOKENS,))
    connections, streams_each, requests_each = 4, 4, 64
    async with Fleet(wide_model, tmp_path) as fleet, contextlib.AsyncExitStack() as stack:
        server = await fleet.start("0-15", options=OPTIONS)
        well = GrpcTransport(server.address)
        shard = await warm_up(server, [well], cases)
        before = server.peak()
        # No experts to compute: answers come as fast as they can be written.
        nothing = torch.full((TOKENS, 4), -1, dtype=torch.int32)
        hidden, weights = cases[0].hidden, cases[0].weights
        fields = (shard.model_fingerprint, None, cases[0].layer, hidden, None, nothing, weights, torch.float32)
        written = 0

        async def write(stream: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
            nonlocal written
            for number in range(1, requests_each + 1):
                await stream.write(codec.encode_call(ExecuteCall(number, *fields)))
                written += 1

        async with asyncio.TaskGroup() as writers:
            tasks = []
            for _ in range(connections):
                channel = ClientSecurity().open_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
                await stack.enter_async_context(channel)
                for _ in range(streams_each):
                    stream: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
                        f"/{codec.SERVICE}/ExecuteStream"
                    )()
                    tasks.append(writers.create_task(write(stream)))
            last = -1
            while written > last:
                last = written
                await asyncio.sleep(1.0)
            grown = server.peak() - before
            started = time.monotonic()
            other = Offers([well], shard, cases)
            await other.send()
            seconds = time.monotonic() - started
            for task in tasks:
                task.cancel()
        await well.close()
    most = budget(connections * streams_each, shard)
    print(
        f"\n{connections * streams_each} streams that do not read: {written} requests of {hidden.nbytes >> 10} KiB,"
        f" peak {before >> 20} MiB and {grown >> 20} more; budget {most >> 20} more; another caller's {seconds:.3f} s"
    )
    assert written < connections * streams_each * requests_each
    assert 0 < grown < most
    assert other.outcomes == {"ok": 1}


async def test_names_of_megabytes_stay_within_the_budget_and_with_nobody(small_model: Path, tmp_path: Path) -> None:
    case = make_cases(small_model, seed=0, sizes=(1,))[0]
    # So that such messages may come at all.
    tokens = NAME_BYTES * 5 // 4 // (4 * case.hidden.shape[1])
    options = (*OPTIONS, "--max-tokens-per-request", str(tokens), "--max-batch-tokens", str(tokens))
    async with Fleet(small_model, tmp_path) as fleet:
        server = await fleet.start("0-15", options=options)
        channel = ClientSecurity().open_channel(server.address, [("grpc.max_send_message_length", -1)])
        transport = GrpcTransport(server.address)
        shard = await warm_up(server, [transport], [case])
        before, sizes = server.peak(), []
        fields = (None, case.layer, case.hidden, None, case.ids.int(), case.weights, torch.float32)
        async with channel:
            execute: Any = channel.unary_unary(f"/{codec.SERVICE}/Execute")

            async def ask(number: int) -> None:
                message = codec.encode_call(ExecuteCall(number, chr(65 + number) * NAME_BYTES, *fields))
                with pytest.raises(grpc.aio.AioRpcError, match=f"... of {NAME_BYTES} bytes"):
                    await execute(message)

            for _ in range(12):
                await asyncio.gather(*(ask(number) for number in range(NAMES)))
                sizes.append(server.rss())
        grown = server.peak() - before
        await transport.close()
    most = NAMES * (WINDOW_BYTES + 2 * shard.max_message_bytes) * 3 // 2
    print(f"\n{NAMES} names of {NAME_BYTES >> 20} MiB: peak {grown >> 20} MiB more; RSS {[s >> 20 for s in sizes]} MiB")
    assert grown < most
    # The allocator has its fill by the middle; half the rounds' names are six times the bound.
    assert sizes[-1] - sizes[len(sizes) // 2 - 1] < NAMES * NAME_BYTES


async def test_calls_leave_nothing_behind(small_model: Path, tmp_path: Path) -> None:
    cases = make_cases(small_model, seed=0, sizes=(1, 2, 3, 8, 20, 33, 48, 64))
    async with Fleet(small_model, tmp_path) as fleet:
        server = await fleet.start("0-15")
        transports: list[Transport] = [GrpcTransport(server.address)]
        transports.append(SharedMemoryTransport(GrpcTransport(server.address), 16 * MIB))
        for transport in transports:
            shard = await transport.get_shard(10.0)
        offers = Offers(transports, shard, cases)
        sizes = []
        for calls in (WARM_UP_CALLS, CALLS - WARM_UP_CALLS):

            async def caller(count: int = calls // 4) -> None:
                for _ in range(count):
                    await offers.send()

            await asyncio.gather(*(caller() for _ in range(4)))
            sizes.append(server.rss())
        for transport in transports:
            await transport.close()
    grown = sizes[1] - sizes[0]
    print(f"\n{CALLS} calls of 1 to 64 tokens: RSS {sizes[0] >> 20} MiB after {WARM_UP_CALLS}, {grown >> 10} KiB more")
    assert (offers.wrong, offers.outcomes) == (0, {"ok": CALLS})
    assert grown < MOST_GROWTH
