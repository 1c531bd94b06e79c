"""Every series: documented, clean, bounded, and saying what happened."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from expertd.client.telemetry.metrics import CoordinatorMetrics
from expertd.kernels.numerics.backend import DeviceMemory
from expertd.kernels.torch.backend import TorchBackend
from expertd.proto import codec
from expertd.server.telemetry.loads import HALF_LIFE, ExpertLoads
from expertd.server.telemetry.metrics import LATENCY_BUCKETS, STAGES, Metrics, adding_seconds
from tests.support.programs import find_program
from tests.support.serving import execute_method, open_channel, random_batch, request_for, running_server, stream_method

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| ([\w, ]*)\|", re.MULTILINE)
ALL = range(16)
MEMORY = DeviceMemory(size=4096, free=1024, allocated=512, reserved=2048)
Series = tuple[str, str, frozenset[str]]
"""Name, type, labels."""


def documented() -> set[Series]:
    return {
        (name, kind, frozenset(filter(None, labels.strip().split(", "))))
        for name, kind, labels in ROW.findall(DOCUMENT.read_text())
    }


def exported(metrics: Iterable[Metric]) -> set[Series]:
    found = set()
    for metric in metrics:
        kind = {"info": "gauge"}.get(metric.type, metric.type)
        name = metric.name + {"info": "_info", "counter": "_total"}.get(metric.type, "")
        labels = {label for sample in metric.samples for label in sample.labels} - {"le"}
        found.add((name, kind, frozenset(labels)))
    return found


async def test_every_series_is_documented_and_every_documented_one_exists(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchBackend, "memory", lambda self: MEMORY)
    coordinator = CollectorRegistry()
    CoordinatorMetrics(coordinator)
    async with running_server(small_model, ALL, per_expert_metrics=True) as server, open_channel(server) as channel:
        await execute_method(channel)(request_for(server, random_batch(4, 256, 16, 4)))
        found = exported([*server.metrics.registry.collect(), *coordinator.collect()])
    assert found == documented()


async def test_promtool_finds_nothing_to_say(small_model: Path) -> None:
    promtool = find_program("promtool", package="prometheus")
    coordinator = CollectorRegistry()
    CoordinatorMetrics(coordinator)
    async with running_server(small_model, ALL, per_expert_metrics=True) as server, open_channel(server) as channel:
        await execute_method(channel)(request_for(server, random_batch(4, 256, 16, 4)))
        text = generate_latest(server.metrics.registry) + generate_latest(coordinator)
    # Series that say when others began; a server process turns them off.
    lines = [line for line in text.splitlines(keepends=True) if b"_created" not in line]
    checked = subprocess.run([promtool, "check", "metrics"], input=b"".join(lines), capture_output=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


async def test_a_gpu_has_memory_and_busy_seconds_and_a_cpu_has_none(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_server(small_model, ALL) as server:
        assert not any(metric.name.startswith("expertd_device") for metric in server.metrics.registry.collect())
    monkeypatch.setattr(TorchBackend, "memory", lambda self: MEMORY)
    async with running_server(small_model, ALL) as server, open_channel(server) as channel:
        answer = await execute_method(channel)(request_for(server, random_batch(4, 256, 16, 4)))
        registry = server.metrics.registry
        for kind in DeviceMemory.__dataclass_fields__:
            assert registry.get_sample_value("expertd_device_memory_bytes", {"kind": kind}) == getattr(MEMORY, kind)
        busy = registry.get_sample_value("expertd_device_busy_seconds_total")
        assert busy == pytest.approx(answer.timings.compute_ns / 1e9, abs=1e-8)


async def test_rpcs_are_counted_by_method_and_status(small_model: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    bearer = (("authorization", "Bearer secret"),)
    async with (
        running_server(small_model, ALL, auth_token_file=tokens) as server,
        open_channel(server) as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        await health.Check(health_pb2.HealthCheckRequest())
        execute = execute_method(channel)
        request = request_for(server, random_batch(1, 256, 16, 4))
        await execute(request, metadata=bearer)
        wrong = request_for(server, random_batch(1, 256, 16, 4), layer=50)
        for refused, metadata in ((wrong, bearer), (request, None)):
            with pytest.raises(grpc.aio.AioRpcError):
                await execute(refused, metadata=metadata)
        stream = stream_method(channel)(metadata=bearer)
        for message in (request, wrong):
            await stream.write(message)
        await stream.done_writing()
        assert len([answer async for answer in stream]) == 2
        for unknown in (f"/{codec.SERVICE}/Nothing", "/a.B/C"):
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(unknown)(b"")  # type: ignore[arg-type]
        watch = health.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        watch.cancel()
    counted = {
        (sample.labels["grpc_method"], sample.labels["grpc_type"], sample.labels["grpc_code"]): sample.value
        for metric in server.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "grpc_server_handled_total" and sample.value
    }
    assert counted == {
        ("Check", "unary", "OK"): 1,
        ("Execute", "unary", "OK"): 1,
        ("Execute", "unary", "NOT_FOUND"): 1,
        ("Execute", "unary", "UNAUTHENTICATED"): 1,
        ("ExecuteStream", "bidi_stream", "OK"): 1,
        ("Watch", "server_stream", "CANCELLED"): 1,
    }


async def test_pairs_of_every_expert_are_exported_on_request_alone(small_model: Path) -> None:
    batch = random_batch(20, 256, 16, 4)
    for wanted in (False, True):
        async with (
            running_server(small_model, ALL, per_expert_metrics=wanted) as server,
            open_channel(server) as channel,
        ):
            await execute_method(channel)(request_for(server, batch, layer=2))
            registry = server.metrics.registry
            found = [
                registry.get_sample_value("expertd_expert_pairs_total", {"layer": "2", "expert": str(expert)})
                for expert in ALL
            ]
            counts = (batch.expert_ids.reshape(-1) + 1).bincount(minlength=17)[1:].double()
            assert found == (counts.tolist() if wanted else [None] * 16)
            balance = registry.get_sample_value("expertd_load_balance_ratio", {"layer": "2"})
            assert balance == pytest.approx(float(counts.mean() / counts.max()))
            assert registry.get_sample_value("expertd_load_balance_ratio", {"layer": "1"}) is None


async def test_the_wait_in_the_queue_is_told_by_layer(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, open_channel(server) as channel:
        for layer, requests in ((1, 1), (2, 3)):
            for _ in range(requests):
                answer = await execute_method(channel)(request_for(server, random_batch(4, 256, 16, 4), layer=layer))
        value = server.metrics.registry.get_sample_value
        waits = [value("expertd_queue_wait_seconds_count", {"layer": layer}) for layer in ("1", "2", "3")]
        assert waits == [1, 3, None]
        assert 0 < (value("expertd_queue_wait_seconds_sum", {"layer": "1"}) or 0) < 1
        stage = value("expertd_stage_duration_seconds_sum", {"stage": "queue"}) or 0
        assert sum(value("expertd_queue_wait_seconds_sum", {"layer": layer}) or 0 for layer in ("1", "2")) < stage
        assert answer.timings.queue_ns > 0


async def test_callers_cannot_make_up_series(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, open_channel(server) as channel:
        execute = execute_method(channel)
        request = request_for(server, random_batch(1, 256, 16, 4))
        await execute(request)
        for number in range(40):
            bad = type(request).FromString(request.SerializeToString())
            bad.layer, bad.request_id = 1000 + number, number
            with pytest.raises(grpc.aio.AioRpcError):
                await execute(bad)
        series = sum(len(metric.samples) for metric in server.metrics.registry.collect())
    assert series < 300


def test_balance_is_mean_over_largest_and_forgets() -> None:
    loads = ExpertLoads((3, 4), (0, 7))
    loads.add(3, [10, 10], now=0.0)
    assert loads.balance() == {3: 1.0}
    loads.add(4, [10, 0], now=0.0)
    assert loads.balance()[4] == 0.5
    loads.add(4, [0, 5], now=HALF_LIFE)
    assert loads.balance()[4] == 1.0
    assert loads.pairs.tolist() == [[10, 10], [10, 5]]


def test_pairs_of_one_second_count_alike_and_old_ones_half_after_a_minute() -> None:
    loads = ExpertLoads((3,), (0, 7))
    for now in (1000.0, 1000.4, 1000.9):
        loads.add(3, [8, 0], now=now)
    assert loads.lately().tolist() == [[24.0, 0.0]]
    loads.add(3, [0, 4], now=1000.0 + HALF_LIFE)
    assert loads.lately().tolist() == [[12.0, 4.0]]
    loads.add(3, [0, 0], now=1000.0 + 3 * HALF_LIFE)
    assert loads.lately().tolist() == [[3.0, 1.0]]
    assert loads.pairs.tolist() == [[24, 4]]


def test_stages_are_counted_like_the_librarys_histogram_counts() -> None:
    metrics, registry = Metrics(CollectorRegistry()), CollectorRegistry()
    like = Histogram("expertd_stage_duration_seconds", "", ["stage"], buckets=LATENCY_BUCKETS, registry=registry)
    # On a bound, on either side of it, beyond both ends.
    for spent in (0.0, 1e-6, 1e-5, 0.0025, 0.0025000001, 0.3, 10.0, 11.0):
        seconds = [spent * (1 + position) for position in range(len(STAGES))]
        metrics.stages.observe(seconds)
        for stage, value in zip(STAGES, seconds, strict=True):
            like.labels(stage).observe(value)
    found, expected = (
        {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in collected.collect()
            if family.name == "expertd_stage_duration_seconds"
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
        for collected in (metrics.registry, registry)
    )
    assert found == expected


def test_startup_phases_add_up() -> None:
    metrics = Metrics(CollectorRegistry())
    for _ in range(2):
        with adding_seconds(metrics.startup.labels("load")):
            pass
    assert (metrics.registry.get_sample_value("expertd_startup_seconds", {"phase": "load"}) or 0) > 0
