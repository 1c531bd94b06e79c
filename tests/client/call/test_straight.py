"""The straight way of calls: the same bits as the long one, and the long one wherever something is wrong."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from opentelemetry.sdk.trace import TracerProvider
from torch import Tensor

from expertd import _native
from expertd.client.base.loop_thread import LoopThread
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.sync import SyncCoordinator
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.kernels.numerics.quantize import dequantize_activations, quantize_activations
from expertd.kernels.oracle.reference import relative_error
from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import DeadlineExceeded, InvalidBatch, ServerFault, Unavailable
from expertd.proto.codec import ExecuteCall, ExecuteResult
from expertd.server.app import Server
from tests.support.coordinators import EXACT, HIDDEN, LAYER, QUICK, expected, free_bytes, routing, segments_of, tokens
from tests.support.fleets import HALVES, addresses, flat, running_replicas, running_servers
from tests.support.model.requests import encode_request, parse_request
from tests.support.serving import Gate, count_of, running_server, until

ALL = range(16)
DEFAULT = CoordinatorConfig()
SHARED = CoordinatorConfig(shared_results=True)
FP8_REPLIES = CoordinatorConfig(reply_dtype=torch.float8_e4m3fn)
SIZES = (1, 7, 1100)
"""The last in parts whose sums are added while others are computed."""
ROUNDING = 1e-8
"""Seconds: round trips are whole nanoseconds."""
BY_MESSAGES: dict[str, Any] = {"shared_memory_bytes": 0}
THE_LONG_WAY = BY_MESSAGES | {"hedge_quantile": 0.99}
WAYS = pytest.mark.parametrize("way", [{}, BY_MESSAGES], ids=["lanes", "messages"])


class Counted(SharedMemoryTransport):
    """Counts the calls that go the long way."""

    def __init__(self, address: str, config: CoordinatorConfig) -> None:
        super().__init__(GrpcTransport(address), config.shared_memory_bytes, config.shared_memory_chunk_bytes)
        self.long = 0

    async def execute(self, call: ExecuteCall) -> ExecuteResult:
        self.long += 1
        return await super().execute(call)


def counted(config: CoordinatorConfig, transports: list[Counted]) -> Callable[[str], Counted]:
    def open_transport(address: str) -> Counted:
        transports.append(Counted(address, config))
        return transports[-1]

    return open_transport


def routed(count: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    ids, weights = routing(count, count)
    return {"layer": LAYER, "hidden": tokens(count, count).to(dtype), "topk_ids": ids, "topk_weights": weights}


@asynccontextmanager
async def both_ways(
    model: Path, config: CoordinatorConfig
) -> AsyncIterator[tuple[list[Server], Coordinator, Coordinator, list[Counted]]]:
    """Two servers, a coordinator whose calls go the long way, and one of `config` with its transports."""
    transports: list[Counted] = []
    async with (
        running_servers(model, HALVES, max_tokens_per_request=200) as servers,
        Coordinator(addresses(servers), replace(config, **THE_LONG_WAY)) as long,
        Coordinator(addresses(servers), config, open_transport=counted(config, transports)) as moe,
    ):
        yield servers, long, moe, transports


def all_free(transports: list[Counted]) -> bool:
    return all(free_bytes(segment) == segment.size for one in transports for segment in segments_of(one))


@WAYS
@pytest.mark.parametrize(
    "config",
    [
        DEFAULT,
        EXACT,
        replace(DEFAULT, hidden_dtype=torch.bfloat16),
        replace(DEFAULT, output_dtype=torch.float32),
        replace(DEFAULT, shared_memory_chunk_bytes=50_000),
        FP8_REPLIES,
        replace(EXACT, reply_dtype=torch.float8_e4m3fn, shared_memory_chunk_bytes=20_000, chunk_bytes=20_000),
        replace(FP8_REPLIES, checksums="always"),
        replace(DEFAULT, tracer=TracerProvider().get_tracer("test")),
    ],
    ids=[
        *("float8", "exact", "bfloat16", "float32-out", "in-chunks"),
        *("fp8-replies", "fp8-replies-in-chunks", "fp8-replies-checked", "traced"),
    ],
)
async def test_results_are_those_of_the_long_way_bit_for_bit(
    small_model: Path, config: CoordinatorConfig, way: dict[str, Any]
) -> None:
    async with both_ways(small_model, replace(config, **way)) as (_, long, moe, transports):
        for count in SIZES:
            call = routed(count)
            right = await long.execute(**call)
            result = await moe.execute(**call)
            here = await asyncio.to_thread(execute_here, moe, call, asyncio.get_running_loop())
            assert torch.equal(result.output, right.output)
            assert torch.equal(here, right.output)
            assert [(one.address, one.tokens, one.pairs) for one in result.servers] == [
                (one.address, one.tokens, one.pairs) for one in right.servers
            ]
            assert all(one.round_trip + ROUNDING > one.timings.total > 0 for one in result.servers)
        assert [transport.long for transport in transports] == [0, 0]
        assert all_free(transports)
        assert all(member.outstanding_tokens == 0 for member in moe._connected().membership.members.values())


@pytest.mark.parametrize(
    "config",
    [
        SHARED,
        replace(EXACT, shared_results=True),
        replace(SHARED, shared_memory_chunk_bytes=50_000),
        replace(SHARED, output_dtype=torch.float32),
        replace(SHARED, reply_dtype=torch.float8_e4m3fn),
        DEFAULT,
    ],
    ids=["bfloat16", "float32", "in-chunks", "widened", "fp8-replies", "by-default"],
)
async def test_sums_of_the_only_server_stay_in_its_memory(small_model: Path, config: CoordinatorConfig) -> None:
    transports: list[Counted] = []
    async with (
        running_server(small_model, ALL, max_tokens_per_request=1200) as server,
        Coordinator([str(server.address)], replace(config, **THE_LONG_WAY)) as long,
        Coordinator([str(server.address)], config, open_transport=counted(config, transports)) as moe,
    ):
        call = routed(1100)
        right = (await long.execute(**call)).output
        (segment,) = segments_of(transports[0])
        memory = torch.frombuffer(segment.memory, dtype=torch.uint8)
        within = range(memory.data_ptr(), memory.data_ptr() + segment.size)
        outputs = [
            (await moe.execute(**call)).output,
            await asyncio.to_thread(execute_here, moe, call, asyncio.get_running_loop()),
        ]
        # What is added as FP32 is rounded on its way, and a token without experts is on no server.
        stay = config.shared_results and config.reply_dtype == config.output_dtype
        assert [one.data_ptr() in within for one in outputs] == [stay, stay]
        assert all(torch.equal(one, right) for one in outputs)
        del outputs
        await asyncio.sleep(0)
        call["topk_ids"][7] = -1
        output = (await moe.execute(**call)).output
        assert output.data_ptr() not in within
        assert not output[7].any()
        assert torch.equal(output[8:], right[8:])
        assert all_free(transports)


@pytest.mark.parametrize("way", [{}, BY_MESSAGES, THE_LONG_WAY], ids=["lanes", "messages", "long"])
async def test_fp8_replies_are_the_exact_sums_rounded_once(small_model: Path, way: dict[str, Any]) -> None:
    config = replace(EXACT, **way)
    call = routed(300)
    async with running_server(small_model, ALL) as server:
        async with Coordinator([str(server.address)], config) as moe:
            exact = (await moe.execute(**call)).output
        async with Coordinator([str(server.address)], replace(config, reply_dtype=torch.float8_e4m3fn)) as moe:
            output = (await moe.execute(**call)).output
    assert torch.equal(output, dequantize_activations(*quantize_activations(exact)))
    assert 0.02 < relative_error(output, exact) < 1 / 16


class OtherDtype(GrpcTransport):
    """Asks for another dtype than it was told to, as a server that ignores it would answer."""

    def __init__(self, address: str, dtype: int) -> None:
        super().__init__(address)
        self._dtype = dtype

    async def exchange(self, request_id: int, message: bytes) -> bytes:
        request = parse_request(message)
        altered = replace(request, reply_dtype=self._dtype, fields_checksum=None, tensors_checksum=None)
        return await super().exchange(request_id, encode_request(altered))


class Cut(GrpcTransport):
    """Loses the last scale of answers, and makes them consistent again."""

    async def exchange(self, request_id: int, message: bytes) -> bytes:
        answer = pb.ExecuteResponse.FromString(await super().exchange(request_id, message))
        answer.partials = answer.partials[:-4]
        answer.checksum = _native.crc32c(answer.partials, _native.crc32c(request_id.to_bytes(8, "little")))
        return answer.SerializeToString()


class Flipped(GrpcTransport):
    """Flips the exponent's last bit of an answer's last scale."""

    async def exchange(self, request_id: int, message: bytes) -> bytes:
        answer = pb.ExecuteResponse.FromString(await super().exchange(request_id, message))
        answer.partials = answer.partials[:-2] + bytes([answer.partials[-2] ^ 0x80]) + answer.partials[-1:]
        return answer.SerializeToString()


class Padded(GrpcTransport):
    """Adds four bytes that the checksum does not cover."""

    async def exchange(self, request_id: int, message: bytes) -> bytes:
        answer = pb.ExecuteResponse.FromString(await super().exchange(request_id, message))
        answer.partials += bytes(4)
        return answer.SerializeToString()


class Another(GrpcTransport):
    """Gives out an answer as one to the next request."""

    async def exchange(self, request_id: int, message: bytes) -> bytes:
        answer = pb.ExecuteResponse.FromString(await super().exchange(request_id, message))
        answer.request_id = request_id + 1
        answer.checksum = _native.crc32c(answer.partials, _native.crc32c(answer.request_id.to_bytes(8, "little")))
        return answer.SerializeToString()


async def test_an_answer_to_another_request_is_not_taken(small_model: Path) -> None:
    config = replace(QUICK, max_attempts=1, **BY_MESSAGES)
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], config, open_transport=Another) as moe,
    ):
        with pytest.raises(ServerFault, match=r"the answer is to request \d+; request \d+ was sent"):
            await moe.execute(**routed(5))


@pytest.mark.parametrize(
    ("transport", "complaint"),
    [
        (Cut, r"partials has 1316 bytes; \[5, 256\] float8_e4m3fn with scales \[5, 2\] float32 takes 1320"),
        (Flipped, "its checksum does not match its partials"),
        (Padded, "its checksum does not match its partials"),
    ],
)
@pytest.mark.parametrize("way", [BY_MESSAGES, THE_LONG_WAY], ids=["messages", "long"])
async def test_fp8_replies_whose_scales_are_wrong_are_not_taken(
    small_model: Path, transport: type[GrpcTransport], complaint: str, way: dict[str, Any]
) -> None:
    config = replace(FP8_REPLIES, max_attempts=1, **way)
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], config, open_transport=transport) as moe,
    ):
        with pytest.raises(ServerFault, match=complaint):
            await moe.execute(**routed(5))


@pytest.mark.parametrize(
    ("dtype", "error", "complaint"),
    [
        (2, ServerFault, "partials_dtype is DTYPE_BFLOAT16; accepted: DTYPE_FLOAT8_E4M3FN"),
        # What a server that is older than FP8 replies says, of a dtype that is newer than this one.
        (9, InvalidBatch, "reply_dtype is 9; accepted: DTYPE_FLOAT32, DTYPE_BFLOAT16, DTYPE_FLOAT8_E4M3FN"),
    ],
)
async def test_a_server_that_has_no_such_replies_is_told_apart(
    small_model: Path, dtype: int, error: type[Exception], complaint: str
) -> None:
    config = replace(FP8_REPLIES, max_attempts=1)
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], config, open_transport=lambda at: OtherDtype(at, dtype)) as moe,
    ):
        with pytest.raises(error, match=complaint):
            await moe.execute(**routed(5))


class Messenger(LoopThread):
    """An event loop that runs already; it sends messages and nothing else."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def soon(self, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(function)

    def start(self, call: Any) -> Any:  # noqa: ANN401
        raise AssertionError(f"{call} goes the long way")


def execute_here(moe: Coordinator, call: dict[str, Any], loop: asyncio.AbstractEventLoop) -> Tensor:
    """On this thread; the event loop sends nothing but messages."""
    hidden, ids, weights = call["hidden"], call["topk_ids"], call["topk_weights"]
    return moe.submit_here(call["layer"], hidden, None, ids, weights, Messenger(loop)).result().output


@WAYS
async def test_awaited_calls_of_many_tokens_go_on_threads(
    small_model: Path, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd.client.call.routed.LONG_ELEMENTS", 0)
    async with both_ways(small_model, replace(DEFAULT, **way)) as (servers, long, moe, transports):
        members = moe._connected().membership.members.values()
        right = [(await long.execute(**routed(count))).output for count in SIZES]
        results = await asyncio.gather(*(moe.execute(**routed(count)) for count in SIZES for _ in range(4)))
        assert all(torch.equal(result.output, right[index // 4]) for index, result in enumerate(results))
        assert [transport.long for transport in transports] == [0, 0]
        del results
        # What is given up ends at once, on its thread as with its servers.
        gate = Gate(servers[1])
        given_up = [asyncio.create_task(moe.execute(**routed(7)))]
        await until(lambda: bool(gate.reached))
        # Those wait: together they would have been one batch.
        given_up += [asyncio.create_task(moe.execute(**routed(7))) for _ in range(2)]
        await until(lambda: servers[1].engine.queued_tokens > 0)
        for task in given_up:
            task.cancel()
        assert all(
            isinstance(error, asyncio.CancelledError)
            for error in await asyncio.gather(*given_up, return_exceptions=True)
        )
        async with asyncio.timeout(5):
            await until(lambda: all(member.outstanding_tokens == 0 and not member.under_way for member in members))
            await until(lambda: servers[1].engine.queued_tokens == 0)
        gate.open()
        assert torch.equal((await moe.execute(**routed(7))).output, right[1])
        await until(lambda: all_free(transports))
        # Given up before it has begun, it is never sent.
        asyncio.get_running_loop().call_soon((never := asyncio.create_task(moe.execute(**routed(7)))).cancel)
        with pytest.raises(asyncio.CancelledError):
            await never
        await until(lambda: all(member.outstanding_tokens == 0 for member in members) and all_free(transports))


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
async def test_hidden_states_of_every_dtype_are_quantised_alike(
    small_model: Path, dtype: torch.dtype, way: dict[str, Any]
) -> None:
    straight = replace(DEFAULT, **way)
    transports: list[Counted] = []
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], replace(DEFAULT, **THE_LONG_WAY)) as long,
        Coordinator([str(server.address)], straight, open_transport=counted(straight, transports)) as moe,
    ):
        call = routed(40, dtype)
        strided = call | {"hidden": torch.stack([call["hidden"], call["hidden"]], dim=1)[:, 0]}
        right = (await long.execute(**call)).output
        for variant in (call, strided, call | {"topk_ids": call["topk_ids"].int()}):
            assert torch.equal((await moe.execute(**variant)).output, right)
        assert transports[0].long == 0


@pytest.mark.parametrize("way", [{}, BY_MESSAGES, THE_LONG_WAY], ids=["lanes", "messages", "long"])
async def test_a_layer_may_be_an_integer_of_any_kind(small_model: Path, way: dict[str, Any]) -> None:
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], replace(QUICK, **way)) as moe,
    ):
        right = (await moe.execute(**routed(5))).output
        assert torch.equal((await moe.execute(**routed(5) | {"layer": torch.tensor(LAYER)})).output, right)


@WAYS
async def test_a_token_without_experts_gets_zeros_and_a_pair_left_out_is_nobodys(
    small_model: Path, way: dict[str, Any]
) -> None:
    transports: list[Counted] = []
    config = replace(QUICK, **way)
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], config, open_transport=counted(config, transports)) as moe,
    ):
        call = routed(5)
        call["topk_ids"][2] = -1
        call["topk_ids"][3, 1] = -1
        output = (await moe.execute(**call)).output
        assert torch.equal(output[2], torch.zeros(HIDDEN))
        assert output[3].abs().sum() > 0
        nothing = call | {"topk_ids": torch.full_like(call["topk_ids"], -1)}
        assert torch.equal((await moe.execute(**nothing)).output, torch.zeros(5, HIDDEN))
        assert transports[0].long == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"topk_ids": torch.tensor([[3, 3]]), "topk_weights": torch.ones(1, 2)}, "at most once"),
        ({"topk_ids": torch.tensor([[16]]), "topk_weights": torch.ones(1, 1)}, "from 0 to 15"),
        ({"topk_ids": torch.tensor([[-2]]), "topk_weights": torch.ones(1, 1)}, "from 0 to 15"),
        ({"topk_ids": torch.tensor([[2**32 + 1]]), "topk_weights": torch.ones(1, 1)}, "from 0 to 15"),
        ({"topk_ids": torch.tensor([[1]]), "topk_weights": torch.tensor([[float("nan")]])}, "finite"),
        ({"topk_ids": torch.tensor([[1, 2]]), "topk_weights": torch.ones(1, 1)}, "must agree"),
        ({"topk_ids": torch.tensor([[1.0]]), "topk_weights": torch.ones(1, 1)}, "integers"),
        ({"topk_ids": torch.arange(5)[None], "topk_weights": torch.ones(1, 5)}, "top-k is 4"),
    ],
)
async def test_what_no_call_can_have_is_refused_before_anything_is_sent(
    small_model: Path, change: dict[str, Tensor], complaint: str
) -> None:
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], QUICK) as moe:
        with pytest.raises(InvalidBatch, match=complaint):
            await moe.execute(**routed(1) | change)
        assert count_of(server, "invalid_argument") == 0


async def test_without_room_the_long_way_makes_some(small_model: Path) -> None:
    transports: list[Counted] = []
    config = replace(DEFAULT, shared_memory_bytes=1 << 26)
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], config, open_transport=counted(config, transports)) as moe,
    ):
        kept = [segment.lane.take(segment.lane.free_bytes) for segment in segments_of(transports[0])]
        assert kept[0] is not None
        right = (await moe.execute(**routed(40))).output
        assert transports[0].long == 1
        assert torch.equal((await moe.execute(**routed(40))).output, right)
        assert transports[0].long == 1
        assert len(segments_of(transports[0])) == 2


async def test_what_a_lost_server_leaves_is_computed_by_its_replica(small_model: Path) -> None:
    async with running_replicas(small_model) as replicas, Coordinator(flat(replicas), QUICK) as moe:
        right = expected(small_model)
        call = routed(20) | {"hidden": tokens(20)}
        call["topk_ids"], call["topk_weights"] = routing(20)
        for segment in segments_of(moe._connected().membership.members[0].transport):  # type: ignore[arg-type]
            segment.lane.close()
        for _ in range(3):
            assert relative_error((await moe.execute(**call)).output, right) < 1e-5


@WAYS
@pytest.mark.parametrize("on_loop", [True, False], ids=["loop", "thread"])
async def test_a_late_server_is_left_for_its_replica(small_model: Path, on_loop: bool, way: dict[str, Any]) -> None:
    async with running_replicas(small_model) as replicas:
        moe = SyncCoordinator(flat(replicas), replace(QUICK, attempt_timeout=0.3, **way))
        right = expected(small_model)
        ids, weights = routing(20)

        async def output() -> Tensor:
            call = {"topk_ids": ids, "topk_weights": weights}
            if on_loop:
                on_its_loop = moe._coordinator.execute(LAYER, tokens(20), **call)
                return (await asyncio.to_thread(moe._running().wait, on_its_loop)).output
            return await asyncio.to_thread(moe, LAYER, tokens(20), **call)

        await asyncio.to_thread(moe.connect)
        assert relative_error(await output(), right) < 1e-5
        # Idle as they are, they take turns.
        gates = [Gate(half[0]) for half in replicas]
        for _ in range(4):
            assert relative_error(await output(), right) < 1e-5
        assert all(gate.reached for gate in gates)
        for gate in gates:
            gate.open()
        await asyncio.to_thread(moe.close)


@WAYS
async def test_without_a_replica_the_error_names_the_server_and_the_time(
    small_model: Path, way: dict[str, Any]
) -> None:
    transports: list[Counted] = []
    config = replace(QUICK, attempt_timeout=0.2, call_timeout=0.2, **way)
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], config, open_transport=counted(config, transports)) as moe,
    ):
        gate = Gate(server)
        with pytest.raises((DeadlineExceeded, Unavailable), match=str(server.address)):
            await moe.execute(**routed(3))
        gate.open()
        await until(lambda: all_free(transports))


@WAYS
async def test_a_cancelled_call_tells_the_server_and_gives_its_memory_back(
    small_model: Path, way: dict[str, Any]
) -> None:
    transports: list[Counted] = []
    config = replace(QUICK, **way)
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], config, open_transport=counted(config, transports)) as moe,
    ):
        gate = Gate(server)
        first = asyncio.create_task(moe.execute(**routed(3)))
        await until(lambda: bool(gate.reached))
        second = asyncio.create_task(moe.execute(**routed(4)))
        await until(lambda: server.executor.engine.queued_tokens == 4)
        for call in (second, first):
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        await until(lambda: server.executor.engine.queued_tokens == 0)
        gate.open()
        await until(lambda: all_free(transports))
        assert transports[0].long == 0
        assert (await moe.execute(**routed(2))).output.isfinite().all()


async def test_a_signal_ends_the_wait_of_a_thread(small_model: Path) -> None:
    class Alarmed(Exception):
        pass

    def ring(*_: object) -> None:
        raise Alarmed

    async with running_server(small_model, ALL) as server:
        moe = await asyncio.to_thread(SyncCoordinator([str(server.address)], QUICK).connect)
        gate = Gate(server)
        before = signal.signal(signal.SIGALRM, ring)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            began = time.monotonic()
            # On this thread, which signals come to; the server's event loop stands still meanwhile.
            with pytest.raises(Alarmed):
                moe.execute(**routed(3))
            assert time.monotonic() - began < 5
        finally:
            signal.signal(signal.SIGALRM, before)
        gate.open()
        assert moe.execute(**routed(3)).output.isfinite().all()
        await asyncio.to_thread(moe.close)


@WAYS
@pytest.mark.parametrize("held", [0, 1, None], ids=["first-slow", "second-slow", "looks-late"])
async def test_round_trips_end_with_answers_and_not_with_looks_at_them(
    small_model: Path, way: dict[str, Any], held: int | None
) -> None:
    async with running_servers(small_model, HALVES) as servers:
        moe = SyncCoordinator(addresses(servers), replace(QUICK, **way))
        await asyncio.to_thread(moe.connect)
        gate = None if held is None else Gate(servers[held])
        quick = [server for index, server in enumerate(servers) if index != held]
        begun = time.perf_counter()
        pending = moe.submit(**routed(20))
        waiting = None if gate is None else asyncio.create_task(asyncio.to_thread(pending.result))
        await until(lambda: all(count_of(server, "ok") == 1 for server in quick))
        answered = time.perf_counter() - begun
        await asyncio.sleep(answered + 0.5)
        if gate is not None:
            gate.open()
        result = await (asyncio.to_thread(pending.result) if waiting is None else waiting)
        seconds = {one.address: one.round_trip for one in result.servers}
        assert all(seconds[str(server.address)] < answered + 0.5 for server in quick)
        await asyncio.to_thread(moe.close)


async def test_round_trips_of_tasks_end_with_answers_though_the_event_loop_was_busy(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], QUICK) as moe:
        begun = time.perf_counter()
        task = moe.submit(**routed(20))
        while count_of(server, "ok") < 1:
            time.sleep(0.01)
        answered = time.perf_counter() - begun
        time.sleep(answered + 0.5)
        (report,) = (await task).servers
        assert report.round_trip < answered + 0.5
