"""Front ends as callers and operators meet them: real processes in front of a server."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry
from torch import Tensor

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.tools.cluster import LocalCluster
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.numerics.backend import TokenBatch
from expertd.proto import codec
from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import Unauthenticated, Unavailable
from expertd.server.app import Server
from expertd.server.assembly import assemble
from expertd.server.local.front_end import FrontEndHandlers
from expertd.server.local.front_ends import FrontEnds
from expertd.server.options.config import InvalidOption, ServerConfig
from expertd.server.rpc.execution import ExecuteHandlers
from expertd.server.rpc.identity import Identities
from expertd.server.rpc.incoming import Call, Incoming
from expertd.server.telemetry.metrics import Metrics
from tests.support.certificates import Authority
from tests.support.serving import (
    ANY_PORT,
    Gate,
    count_of,
    door,
    execute_method,
    open_channel,
    random_batch,
    request_for,
    running_server,
    stream_method,
    until,
)

ALL = range(16)
SHARED_BYTES = 1 << 20
"""A quarter of it for each of two front ends: enough for `BATCH`, not for `LARGE`."""
BATCH = random_batch(4, hidden=256, experts=16, top_k=4)
LARGE = random_batch(400, hidden=256, experts=16, top_k=4)
OVER_GRPC = CoordinatorConfig(shared_memory_bytes=0, channels=4, chunk_bytes=64 << 10)
IDS, WEIGHTS = torch.arange(4).expand(500, 4), torch.ones(500, 4)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(small_model: Path) -> AsyncIterator[Server]:
    options = {"shared_memory_bytes": SHARED_BYTES, "max_tokens_per_request": 512, "max_streams": 4}
    async with running_server(small_model, ALL, front_ends=2, **options) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(small_model: Path) -> AsyncIterator[Server]:
    """The same without front ends."""
    async with running_server(small_model, ALL, max_tokens_per_request=512) as server:
        yield server


def front_ends_of(parent: int) -> set[int]:
    """Processes."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(words[1]) == parent and b"expertd.server.local.front_end" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def connection(server: Server) -> grpc.aio.Channel:
    """One that no other channel shares."""
    return grpc.aio.insecure_channel(str(server.address), [("grpc.use_local_subchannel_pool", 1)])


async def outcome(server: Server, request: pb.ExecuteRequest) -> object:
    """What a call of its own comes to: the partials and receipt, or code, message and trailing metadata."""
    async with open_channel(server) as channel:
        try:
            return content(await execute_method(channel)(request, timeout=20))
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details(), dict(error.trailing_metadata() or ())


async def streamed(server: Server, request: pb.ExecuteRequest) -> object:
    async with asyncio.timeout(20), open_channel(server) as channel:
        stream: Any = stream_method(channel)()
        await stream.write(request)
        answer = await stream.read()
        stream.cancel()
    return answer.error.SerializeToString() or content(answer)


def content(answer: pb.ExecuteResponse) -> object:
    receipt = dict(zip(answer.receipt_experts, answer.receipt_pairs, strict=True))
    return answer.request_id, answer.partials_dtype, answer.partials, receipt, answer.checksum


@pytest.mark.parametrize("batch", [BATCH, LARGE], ids=["in-shared-memory", "without-room"])
async def test_answers_have_the_same_bits_as_without(server: Server, plain: Server, batch: TokenBatch) -> None:
    for ask in (outcome, streamed):
        expected = await ask(plain, request_for(plain, batch))
        assert isinstance(expected, tuple)
        assert len(expected[2]) == batch.num_tokens * 256 * 4
        assert await ask(server, request_for(server, batch)) == expected


async def test_a_coordinator_gets_the_same_bits_over_several_channels(server: Server, plain: Server) -> None:
    hidden = torch.randn(500, 256)
    async with (
        Coordinator([str(server.address)], OVER_GRPC) as moe,
        Coordinator([str(plain.address)], OVER_GRPC) as expected,
        Coordinator([str(server.address)]) as sharing,
    ):
        right = await expected(1, hidden, topk_ids=IDS, topk_weights=WEIGHTS)
        # More at once than there is room for, in both directions.
        results = await asyncio.gather(*(moe(1, hidden, topk_ids=IDS, topk_weights=WEIGHTS) for _ in range(20)))
        assert all(torch.equal(result, right) for result in results)
        assert torch.equal(await sharing(1, hidden, topk_ids=IDS, topk_weights=WEIGHTS), right)


def edited(request: pb.ExecuteRequest, **fields: object) -> pb.ExecuteRequest:
    request.MergeFrom(pb.ExecuteRequest(**fields))  # type: ignore[arg-type]
    return request


@pytest.mark.parametrize(
    "fields",
    [
        {"model_fingerprint": "other"},
        {"layer": 9},
        {"segment_offset": 0},
        {"gpu_offset": 256},
        {"num_tokens": 5},
        {"weights": b"1234"},
        {"reply_dtype": 7},
        {"placement_epoch": 1},
    ],
    ids=str,
)
async def test_what_is_refused_is_refused_with_the_same_words(
    server: Server, plain: Server, fields: dict[str, object]
) -> None:
    for ask in (outcome, streamed):
        expected = await ask(plain, edited(request_for(plain, BATCH, placement_epoch=None), **fields))
        answer = await ask(server, edited(request_for(server, BATCH, placement_epoch=None), **fields))
        if "placement_epoch" in fields:
            # It names the server's.
            answer, expected = str(answer)[:60], str(expected)[:60]
        assert answer == expected


async def test_a_full_queue_says_when_to_come_back(small_model: Path) -> None:
    options = {"max_tokens_per_request": 4, "max_batch_tokens": 4, "max_queued_tokens": 4}
    async with (
        running_server(small_model, ALL, front_ends=1, **options) as server,
        open_channel(server) as channel,
    ):
        # Then the server knows the device's pace.
        assert content(await execute_method(channel)(request_for(server, BATCH)))
        gate, waiting = Gate(server), []
        for queued in (0, 4):
            waiting.append(asyncio.ensure_future(execute_method(channel)(request_for(server, BATCH))))
            await until(lambda: bool(gate.reached) and server.engine.queued_tokens == queued)  # noqa: B023
        refused: Any = await outcome(server, request_for(server, BATCH))
        assert refused[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        error = pb.Error.FromString(await streamed(server, request_for(server, BATCH)))  # type: ignore[arg-type]
        assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert 1 <= error.retry_after_ms == int(refused[2][codec.PUSHBACK])
        assert error.message == refused[1]
        gate.open()
        await asyncio.gather(*waiting)


async def test_what_nobody_waits_for_leaves_the_queue(server: Server) -> None:
    gate = Gate(server)
    async with open_channel(server) as channel, open_channel(server) as other:
        first = asyncio.ensure_future(execute_method(channel)(request_for(server, BATCH)))
        await until(lambda: gate.reached == [1])
        held = asyncio.ensure_future(execute_method(channel)(request_for(server, BATCH)))
        await until(lambda: server.engine.queued_tokens == 4)

        stream: Any = stream_method(other)()
        await stream.write(request_for(server, BATCH, request_id=3))
        await stream.write(request_for(server, LARGE, request_id=4))
        await until(lambda: server.engine.queued_tokens == 408)
        await stream.write(pb.ExecuteRequest(request_id=99, cancels=4))
        assert (await stream.read()).error.code == grpc.StatusCode.CANCELLED.value[0]
        await until(lambda: server.engine.queued_tokens == 8)
        stream.cancel()
        await until(lambda: server.engine.queued_tokens == 4)

        late = execute_method(channel)(request_for(server, BATCH), timeout=0.3)
        await until(lambda: server.engine.queued_tokens == 8)
        await until(lambda: server.engine.queued_tokens == 4)
        with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
            await late
        held.cancel()
        await until(lambda: server.engine.queued_tokens == 0)
        assert not first.done()
        gate.open()
        assert content(await first)


async def test_callers_have_names_of_their_own_and_take_turns(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_tokens_per_request": 8, "max_batch_tokens": 8, "front_ends": 2}
    async with (
        running_server(small_model, ALL, **options) as server,
        connection(server) as many,
        connection(server) as few,
    ):
        gate, names, submit = Gate(server), set(), server.executor.submit

        def note(incoming: Incoming) -> Call:
            names.add(incoming.caller)
            return submit(incoming)

        monkeypatch.setattr(server.executor, "submit", note)
        flood: Any = stream_method(many)()
        for number in range(1, 41):
            await flood.write(request_for(server, BATCH, request_id=number))
        await until(lambda: bool(gate.reached) and server.engine.queued_tokens >= 4 * 36)
        single = asyncio.ensure_future(execute_method(few)(request_for(server, BATCH)))
        await until(lambda: len(names) == 2)
        assert all(name.startswith("ipv4:127.0.0.1:") for name in names)
        before = count_of(server, "ok")
        gate.open()
        await single
        assert count_of(server, "ok") - before < 30
        for _ in range(40):
            assert not (await flood.read()).error.code
        flood.cancel()


async def test_health_reflection_and_what_is_unknown_pass_through(server: Server) -> None:
    async with contextlib.AsyncExitStack() as stack:
        # More than may be open on one connection.
        for _ in range(20):
            health: Any = health_pb2_grpc.HealthStub(await stack.enter_async_context(connection(server)))
            watch = health.Watch(health_pb2.HealthCheckRequest(service=codec.SERVICE))
            async with asyncio.timeout(20):
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        channel: Any = await stack.enter_async_context(connection(server))
        asking: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = asking.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        async with asyncio.timeout(20):
            services = (await asked.read()).list_services_response.service
        assert codec.SERVICE in {service.name for service in services}
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=20)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        method: Any = channel.unary_unary(f"/{codec.SERVICE}/Nothing")
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await method(b"", timeout=20)
        assert unknown.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_callers_on_other_machines_get_no_ticket_whatever_they_say(server: Server) -> None:
    class Refused(Exception): ...

    class Remote:
        """A call from another machine that says it is from this one."""

        def peer(self) -> str:
            return "ipv4:192.0.2.1:5"

        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return (("forwarded", "for=127.0.0.1"), ("x-forwarded-for", "127.0.0.1"), ("peer", "unix:"))

        def time_remaining(self) -> None: ...

        async def write(self, message: bytes) -> None:
            raise AssertionError("a ticket was given away")

        def set_trailing_metadata(self, metadata: object) -> None: ...

        async def abort(self, code: grpc.StatusCode, details: str, *trailing: object) -> None:
            raise Refused(code, details)

    class Details:
        method = f"/{codec.SERVICE}/RegisterSharedMemory"

    async def requests() -> AsyncIterator[bytes]:
        yield b""

    address = f"unix:{door(server, FrontEnds).socket}"
    async with grpc.aio.insecure_channel(address) as channel:
        handlers: Any = FrontEndHandlers(ExecuteHandlers(None, 1, Identities(by_token=False)), channel)  # type: ignore[arg-type]
        method: Any = handlers.service(Details()).stream_stream
        with pytest.raises(Refused, match=r"ipv4:192\.0\.2\.1:5 is not on this server's machine"):
            await method(requests(), Remote())


async def test_a_second_server_on_the_port_is_refused(server: Server, small_model: Path) -> None:
    config = ServerConfig(
        model=small_model, experts=(0,), listen=server.address, metrics=ANY_PORT, backend="torch", front_ends=1
    )
    with pytest.raises(InvalidOption, match=rf"--listen {server.address} cannot be bound: .*in use"):
        await assemble(config, Metrics(CollectorRegistry())).run()


async def call_until(stop: asyncio.Event, moe: Coordinator, hidden: Tensor, right: Tensor) -> int:
    """Call and compare until told to stop; how many calls."""
    calls = 0
    while not stop.is_set():
        assert torch.equal(await moe(1, hidden, topk_ids=IDS, topk_weights=WEIGHTS), right)
        calls += 1
    return calls


@contextlib.asynccontextmanager
async def load(addresses: list[str]) -> AsyncIterator[None]:
    """Calls all the while, every one of them answered and right."""
    hidden, stop = torch.randn(500, 256), asyncio.Event()
    config = CoordinatorConfig(shared_memory_bytes=0, channels=4, chunk_bytes=64 << 10, owner_timeout=20.0)
    async with Coordinator(addresses, config) as moe:
        right = await moe(1, hidden, topk_ids=IDS, topk_weights=WEIGHTS)
        calling = [asyncio.create_task(call_until(stop, moe, hidden, right)) for _ in range(3)]
        try:
            yield
        finally:
            stop.set()
            assert all([await calls > 0 for calls in calling])


async def test_a_killed_front_end_comes_back_and_no_call_fails(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with load([str(server.address)]):
        before = front_ends_of(os.getpid())
        assert len(before) == 2
        for process in before:
            os.kill(process, signal.SIGKILL)
            await until(lambda: door(server, FrontEnds).listening < 2)
            await until(lambda: door(server, FrontEnds).listening == 2)
    assert not front_ends_of(os.getpid()) & before
    assert "front end 0 ended: exit code -9; another one starts in 0.1 s" in caplog.text
    await until(lambda: server.journal.in_flight == 0)


async def test_memory_is_taken_back_from_front_ends_before_a_stuck_device_may_write_to_it(server: Server) -> None:
    gate = Gate(server)
    before = front_ends_of(os.getpid())
    async with open_channel(server) as channel:
        call = asyncio.ensure_future(execute_method(channel)(request_for(server, BATCH), timeout=20))
        await until(lambda: gate.reached == [1])
        door(server, FrontEnds).disconnect()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    await until(lambda: door(server, FrontEnds).listening == 2)
    assert not front_ends_of(os.getpid()) & before
    gate.open()


async def test_callers_are_checked_by_the_front_ends(small_model: Path, tmp_path: Path) -> None:
    authority, tokens = Authority(tmp_path), tmp_path / "tokens"
    cert, key = authority.issue("server")
    tokens.write_text("right")
    security = ClientSecurity(root_ca=authority.pem, token="right")
    options = {"tls_cert": cert, "tls_key": key, "auth_token_file": tokens, "front_ends": 1}
    async with running_server(small_model, ALL, **options) as server:
        address = str(server.address)
        async with Coordinator([address], CoordinatorConfig(security=security, shared_memory_bytes=0)) as moe:
            await moe(1, torch.randn(500, 256), topk_ids=IDS, topk_weights=WEIGHTS)
        wrong = ClientSecurity(root_ca=authority.pem, token="wrong")
        with pytest.raises(Unauthenticated, match="no bearer token that this server accepts"):
            await Coordinator([address], CoordinatorConfig(security=wrong)).__aenter__()
        async with wrong.open_channel(address, []) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="authorization is missing"):
                await execute_method(channel)(request_for(server, BATCH), timeout=20)
        with pytest.raises(Unavailable):
            await Coordinator([address], CoordinatorConfig(connect_timeout=1.0)).__aenter__()


async def test_a_drain_loses_nothing_and_front_ends_end_with_a_killed_server(small_model: Path) -> None:
    options = ["--backend", "torch", "--threads", "1", "--front-ends", "1"]
    async with LocalCluster(small_model, ["0-15", "0-15"], options) as cluster:
        drained, killed = (server.process for server in cluster.servers)
        async with load(cluster.addresses):
            await asyncio.sleep(0.5)
            # To the whole group, front ends included.
            os.killpg(drained.pid, signal.SIGTERM)
            assert await asyncio.wait_for(drained.wait(), 20) == 0, cluster.servers[0].log.read_text()
        log = cluster.servers[0].log.read_text()
        assert "Traceback" not in log
        assert "front end 0 ended" not in log
        (orphan,) = front_ends_of(killed.pid)
        killed.kill()
        await until(lambda: not Path(f"/proc/{orphan}").exists())
