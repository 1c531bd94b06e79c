"""A server in this process: what it says of itself, its metrics, its streams and its drain."""

import asyncio
import contextlib
import json
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry

from expertd import __version__, _native
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.experts import ExpertMatrices
from expertd.proto import codec
from expertd.server.app import Server
from expertd.server.assembly import assemble
from expertd.server.options.config import InvalidOption, ServerConfig
from expertd.server.rpc.conversation import Conversation
from expertd.server.telemetry.metrics import Metrics
from tests.support.serving import (
    Gate,
    execute_method,
    open_channel,
    random_batch,
    request_for,
    running_server,
    stream_method,
    until,
)

ALL = range(16)
SETTINGS, GOAWAY = 4, 7
"""Types of HTTP/2 frames."""


async def scrape(server: Server) -> dict[str, float]:
    def read() -> str:
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as answer:
            return str(answer.read(), "utf-8")

    text = await asyncio.to_thread(read)
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


async def test_get_shard_tells_what_a_caller_needs(small_model: Path) -> None:
    async with running_server(small_model, range(4, 8), layers=(2,)) as server, open_channel(server) as channel:
        method = channel.unary_unary(
            f"/{codec.SERVICE}/GetShard", codec.ShardRequest.SerializeToString, codec.ShardResponse.FromString
        )
        shard = codec.decode_shard(await method(codec.ShardRequest()))
        assert shard.instruction_set == _native.instruction_set()
    assert shard.experts == {2: (4, 5, 6, 7)}
    assert (shard.backend, shard.backend_reason, shard.version) == ("torch", "--backend torch", __version__)
    assert shard.config["hidden_size"] == 256
    assert shard.config["routed_scaling_factor"] == 2.5
    assert shard.max_tokens_per_request == 4096
    assert len(shard.model_fingerprint) == 64


async def test_reflection_describes_the_service(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, open_channel(server) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([request])):
            names = {service.name for service in answer.list_services_response.service}
            assert {codec.SERVICE, "grpc.health.v1.Health"} <= names
            break


async def test_metrics_count_every_outcome_and_stage(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, open_channel(server) as channel:
        execute = execute_method(channel)
        for tokens in (1, 3):
            await execute(request_for(server, random_batch(tokens, 256, 16, 4, absent=0.0)))
        with pytest.raises(grpc.aio.AioRpcError):
            await execute(request_for(server, random_batch(1, 256, 16, 4), layer=50))
        samples = await scrape(server)
    assert samples['expertd_requests_total{outcome="ok"}'] == 2
    assert samples['expertd_requests_total{outcome="not_found"}'] == 1
    assert samples["expertd_tokens_total"] == 4
    assert samples["expertd_pairs_total"] == 16
    assert samples["expertd_batch_tokens_count"] == 2
    assert samples["expertd_queue_tokens"] == 0
    assert samples["expertd_layers_loaded"] == 2
    assert samples["expertd_weights_bytes"] == 2 * 16 * 3 * (256 * 128 + 2 * 4)
    for stage in ("decode", "queue", "copy_in", "compute", "copy_out", "encode", "total"):
        assert samples[f'expertd_stage_duration_seconds_count{{stage="{stage}"}}'] == 2
    bounds = [name for name in samples if name.startswith("expertd_stage_duration_seconds_bucket") and "total" in name]
    assert 'expertd_stage_duration_seconds_bucket{le="1e-05",stage="total"}' in bounds
    assert 'expertd_stage_duration_seconds_bucket{le="10.0",stage="total"}' in bounds
    assert any(name.startswith("expertd_build_info") and __version__ in name for name in samples)


async def test_stream_answers_carry_their_request_ids_and_right_results(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, open_channel(server) as channel:
        calls = [
            request_for(
                server, random_batch(tokens, 256, 16, 4, seed=tokens), request_id=100 + tokens, layer=1 + tokens % 2
            )
            for tokens in (1, 30, 2, 7)
        ]
        alone = {call.request_id: await execute_method(channel)(call) for call in calls}
        stream = stream_method(channel)()
        for call in calls:
            await stream.write(call)
        await stream.done_writing()
        answers = [answer async for answer in stream]
        assert sorted(answer.request_id for answer in answers) == [101, 102, 107, 130]
        for answer in answers:
            assert answer.partials == alone[answer.request_id].partials
            assert answer.timings.compute_ns > 0


async def test_refusals_for_overload_say_when_to_come_back_and_cost_no_time(small_model: Path) -> None:
    options = {"max_tokens_per_request": 64, "max_batch_tokens": 64, "max_queued_tokens": 64}
    async with running_server(small_model, ALL, **options) as server, open_channel(server) as channel:
        execute, request = execute_method(channel), request_for(server, random_batch(64, 256, 16, 4))
        await execute(request)
        refused = []
        for answer in await asyncio.gather(*(execute(request) for _ in range(20)), return_exceptions=True):
            if isinstance(answer, grpc.aio.AioRpcError):
                assert answer.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                refused.append(int(dict(answer.trailing_metadata())["grpc-retry-pushback-ms"]))
        assert refused
        assert all(1 <= delay <= 5000 for delay in refused)
        stream = stream_method(channel)()
        for number in range(20):
            await stream.write(request_for(server, random_batch(64, 256, 16, 4), request_id=number))
        await stream.done_writing()
        errors = [answer.error async for answer in stream if answer.HasField("error")]
        assert errors
        assert all(1 <= error.retry_after_ms <= 5000 for error in errors)
        samples = await scrape(server)
        assert samples["expertd_refusal_duration_seconds_count"] == len(refused) + len(errors)


async def test_a_full_server_reads_nothing_of_what_it_refuses(small_model: Path) -> None:
    options = {"max_tokens_per_request": 4, "max_batch_tokens": 4, "max_queued_tokens": 4}
    async with running_server(small_model, ALL, **options) as server, open_channel(server) as channel:
        gate, execute = Gate(server), execute_method(channel)
        fits = [asyncio.ensure_future(execute(request_for(server, random_batch(4, 256, 16, 4))))]
        await until(lambda: len(gate.reached) == 1)
        fits.append(asyncio.ensure_future(execute(request_for(server, random_batch(4, 256, 16, 4)))))
        await until(lambda: server.engine.queued_tokens == 4)
        malformed = request_for(server, random_batch(3, 256, 16, 4))
        malformed.hidden = b"xyz"
        with pytest.raises(grpc.aio.AioRpcError, match="4 tokens are queued and num_tokens is 3; at most 4 may wait"):
            await execute(malformed)
        gate.open()
        await asyncio.gather(*fits)


async def test_a_caller_who_does_not_read_is_not_read_from(small_model: Path) -> None:
    count, tokens = 300, 100
    async with (
        running_server(small_model, ALL, max_tokens_per_request=tokens, max_queued_bytes=1 << 20) as server,
        open_channel(server) as channel,
    ):
        stream = stream_method(channel)()
        request = request_for(server, random_batch(tokens, 256, 16, 4))

        written = 0

        def computed() -> float:
            return server.metrics.registry.get_sample_value("expertd_tokens_total") or 0.0

        async def write() -> None:
            nonlocal written
            for written in range(count):
                request.request_id = written
                await stream.write(request)
                # Not faster than it computes: what it has read already it must answer.
                while reading_nothing.is_set() and computed() < (written - 5) * tokens:
                    await asyncio.sleep(0.001)
            await stream.done_writing()

        reading_nothing = asyncio.Event()
        reading_nothing.set()
        writing, before = asyncio.create_task(write()), -1.0
        while computed() > before:
            before = computed()
            await asyncio.sleep(1.0)
        assert written < count - 1
        reading_nothing.clear()
        assert {answer.request_id async for answer in stream} == set(range(count))
        await writing


async def test_bfloat16_replies_are_the_rounded_float32_ones(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, open_channel(server) as channel:
        batch = random_batch(9, 256, 16, 4)
        full, half = [
            torch.frombuffer(bytearray(answer.partials), dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
            for answer in [await execute_method(channel)(request_for(server, batch, reply_dtype=dtype))]
        ]
        assert torch.equal(full.bfloat16(), half)
        assert 0 < relative_error(half, full) < 4e-3


async def test_drain_turns_unhealthy_answers_what_is_in_flight_and_ends_streams(
    small_model: Path, tmp_path: Path
) -> None:
    ready_file = tmp_path / "ready.json"
    async with running_server(small_model, ALL, ready_file=ready_file) as server, open_channel(server) as channel:
        assert json.loads(ready_file.read_text())["listen"] == str(server.address)
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=codec.SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stream = stream_method(channel)()
        await stream.write(request_for(server, random_batch(1, 256, 16, 4)))
        await stream.read()
        in_flight = [request_for(server, random_batch(2000, 256, 16, 4), request_id=number) for number in (1, 2)]
        for call in in_flight:
            await stream.write(call)
        while server.metrics.registry.get_sample_value("expertd_requests_in_flight") != 2:
            await asyncio.sleep(0.001)
        server.stop()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        answers = []
        while (answer := await stream.read()) is not grpc.aio.EOF:
            answers.append(answer)
        assert {answer.request_id for answer in answers} == {1, 2}
        assert all(len(answer.partials) == 2000 * 256 * 4 for answer in answers)
        assert await stream.code() == grpc.StatusCode.OK
    assert not ready_file.exists()


async def test_drain_answers_all_of_a_stream_whose_caller_has_sent_its_last_request(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, idle = asyncio.Event(), Conversation.idle

    async def at_its_end(conversation: Conversation) -> None:
        ended.set()
        await idle(conversation)

    monkeypatch.setattr(Conversation, "idle", at_its_end)
    async with running_server(small_model, ALL) as server, open_channel(server) as channel:
        gate = Gate(server)
        stream = stream_method(channel)()
        for number in range(5):
            await stream.write(request_for(server, random_batch(1, 256, 16, 4), request_id=number))
        await stream.done_writing()
        await asyncio.wait_for(ended.wait(), 20)
        server.handlers.execution.stop_reading()
        gate.open()
        answers = []
        while (answer := await stream.read()) is not grpc.aio.EOF:
            answers.append(answer.request_id)
        assert sorted(answers) == [0, 1, 2, 3, 4]


async def test_drain_answers_what_is_on_its_way_and_says_goaway_after_health_has_turned(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, open_channel(server) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        reader, writer = await asyncio.open_connection(server.address.host, server.address.port)
        # HTTP/2 by hand: the client's preface and empty settings.
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]))
        goaway = asyncio.create_task(frame_of(reader, GOAWAY))
        server.stop()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        get_shard: Any = channel.unary_unary(f"/{codec.SERVICE}/GetShard")
        with pytest.raises(grpc.aio.AioRpcError, match="the server is draining") as caught:
            await get_shard(b"")
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert not goaway.done()
        request = request_for(server, random_batch(1, 256, 16, 4))
        assert (await execute_method(channel)(request)).partials
        watch.cancel()
        await asyncio.wait_for(goaway, 10)
        writer.close()


async def frame_of(reader: asyncio.StreamReader, kind: int) -> bytes:
    """The payload of the next HTTP/2 frame of `kind`."""
    while True:
        header = await reader.readexactly(9)
        payload = await reader.readexactly(int.from_bytes(header[:3]))
        if header[3] == kind:
            return payload


async def test_a_drain_does_not_wait_for_a_shadow_check_that_does_not_end(small_model: Path) -> None:
    checking, let_go = threading.Event(), threading.Event()

    def read(*_: object) -> ExpertMatrices:
        checking.set()
        let_go.wait(30)
        raise OSError("let go")

    async with running_server(small_model, ALL, drain_seconds=1.0, shadow_check_rate=1.0) as server:
        assert server.shadow is not None
        server.shadow.read = read
        async with open_channel(server) as channel:
            await execute_method(channel)(request_for(server, random_batch(1, 256, 16, 4)))
        await until(checking.is_set)
        started = time.monotonic()
    # Of the drain, and a second each for what is given time to end by itself.
    assert time.monotonic() - started < 1.0 + 2.5
    let_go.set()


async def test_a_stuck_device_does_not_prolong_the_drain(small_model: Path) -> None:
    async with contextlib.AsyncExitStack() as channels:
        async with running_server(small_model, ALL, drain_seconds=2.0) as server:
            server.notice_seconds = 1.5
            gate = Gate(server)
            channel = await channels.enter_async_context(open_channel(server))
            unanswered = asyncio.ensure_future(
                execute_method(channel)(request_for(server, random_batch(1, 256, 16, 4)))
            )
            await until(lambda: len(gate.reached) == 1)
            started = time.monotonic()
        # The time for those on their way is part of it.
        assert time.monotonic() - started < 2.9
        gate.open()
        with pytest.raises(grpc.aio.AioRpcError):
            await unanswered


async def test_no_thread_of_the_device_is_left_to_the_end_of_the_interpreter(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        chore = server.device.call(lambda: time.sleep(0.3))
    assert not any(thread.is_alive() for thread in server.device._threads)
    await chore


async def test_watchers_of_health_do_not_hold_up_the_drain(small_model: Path) -> None:
    loop = asyncio.get_running_loop()
    async with running_server(small_model, ALL, drain_seconds=60.0) as server, open_channel(server) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        started = loop.time()
        server.stop()
        while (await watch.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
            pass
        with pytest.raises(grpc.aio.AioRpcError):
            await watch.read()
        assert loop.time() - started < 30


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"layers": (0, 1)}, "--layers names layer 0; the model's MoE layers are 1-2"),
        ({"experts": (3, 16)}, "--experts names expert 16; the model's experts are 0-15"),
    ],
    ids=["layer", "expert"],
)
def test_layers_and_experts_outside_the_model_are_refused(
    small_model: Path, options: dict[str, tuple[int, ...]], complaint: str
) -> None:
    with pytest.raises(InvalidOption, match=complaint):
        assemble(ServerConfig(**({"model": small_model, "experts": (0,)} | options)), Metrics(CollectorRegistry()))  # type: ignore[arg-type]


async def test_a_port_in_use_is_refused_with_the_option(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        for option in ("listen", "metrics"):
            taken = {"listen": server.address, "metrics": server.metrics_address}[option]
            free = {"listen": "metrics", "metrics": "listen"}[option]
            config = ServerConfig(
                model=small_model,
                experts=(0,),
                **{option: taken, free: type(taken)("127.0.0.1", 0)},  # type: ignore[arg-type]
            )
            with pytest.raises(InvalidOption, match=f"--{option} {taken} cannot be bound"):
                await assemble(config, Metrics(CollectorRegistry())).run()
