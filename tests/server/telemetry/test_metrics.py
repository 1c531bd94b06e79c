"""Every series: documented, clean, bounded, and saying what happened."""

import contextlib
import hashlib
import re
import subprocess
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.utils import floatToGoString

from expertd import _native
from expertd.client.telemetry.metrics import CoordinatorMetrics
from expertd.kernels.numerics.backend import Backend, DeviceMemory
from expertd.kernels.torch.backend import TorchBackend
from expertd.proto import codec
from expertd.server.hardware.gpu_health import GpuHealth
from expertd.server.scheduling.node import Device
from expertd.server.telemetry.journal import STAGE_BUCKETS, Journal, shown
from expertd.server.telemetry.loads import HALF_LIFE, ExpertLoads
from expertd.server.telemetry.metrics import FINE_BUCKETS, LATENCY_BUCKETS, STAGES, Metrics, adding_seconds, buckets
from expertd.server.telemetry.tracing import RequestTracer
from tests.support.native.hand_turned import HandTurned, message
from tests.support.native.stand_in_nvml import UUID, StandInNvml
from tests.support.programs import find_program
from tests.support.serving import (
    ANY_PORT,
    execute_method,
    open_channel,
    random_batch,
    request_for,
    running_server,
    stream_method,
)

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| ([\w, ]*)\|", re.MULTILINE)
ALL = range(16)
MEMORY = DeviceMemory(size=4096, free=1024, allocated=512, reserved=2048, reusable=256)


class OnDevice(TorchBackend):
    """Like one with memory of its own."""

    def memory(self) -> DeviceMemory:  # type: ignore[override]
        return MEMORY


def on_device(*_: object) -> tuple[Backend, str]:
    return OnDevice(), "a test"


def watched(_: Device) -> GpuHealth | None:
    return GpuHealth.open(StandInNvml(), UUID)


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


class NoFleet:
    def standings(self) -> dict[str, int]:
        return {}

    def count_ownerless(self) -> int:
        return 0

    def loads(self) -> dict[tuple[str, int], dict[str, float]]:
        return {("model", 1): {"a:1": 300.0, "b:1": 100.0}}


async def test_every_series_is_documented_and_every_documented_one_exists(small_model: Path) -> None:
    coordinator = CollectorRegistry()
    metrics = CoordinatorMetrics(coordinator)
    metrics.attempts.ended("a:1", "grpc", "ok", 0.1, "")
    metrics.follow(NoFleet(), lambda: {"root_ca": 0.0})
    async with (
        running_server(
            small_model,
            ALL,
            per_expert_metrics=True,
            choose=on_device,
            open_gpu=watched,
            admin_listen=ANY_PORT,
            devices=(0, 1),
        ) as server,
        open_channel(server) as channel,
    ):
        # What only TLS has.
        server.metrics.certificates.set_function(lambda: [(("tls_cert",), (0.0,))])
        execute = execute_method(channel)
        await execute(request_for(server, random_batch(4, 256, 16, 4)))
        with pytest.raises(grpc.aio.AioRpcError):
            await execute(request_for(server, random_batch(4, 256, 16, 4), layer=50))
        found = exported([*server.metrics.registry.collect(), *coordinator.collect()])
    assert found == documented()


async def test_promtool_finds_nothing_to_say(small_model: Path) -> None:
    promtool = find_program("promtool", package="prometheus")
    coordinator = CollectorRegistry()
    CoordinatorMetrics(coordinator)
    async with (
        running_server(small_model, ALL, per_expert_metrics=True, admin_listen=ANY_PORT) as server,
        open_channel(server) as channel,
    ):
        await execute_method(channel)(request_for(server, random_batch(4, 256, 16, 4)))
        text = generate_latest(server.metrics.registry) + generate_latest(coordinator)
    # Series that say when others began; a server process turns them off.
    lines = [line for line in text.splitlines(keepends=True) if b"_created" not in line]
    checked = subprocess.run([promtool, "check", "metrics"], input=b"".join(lines), capture_output=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


async def test_a_gpu_has_memory_and_busy_seconds_and_a_cpu_has_none(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        assert not any(metric.name.startswith("expertd_device") for metric in server.metrics.registry.collect())
    async with running_server(small_model, ALL, choose=on_device) as server, open_channel(server) as channel:
        answer = await execute_method(channel)(request_for(server, random_batch(4, 256, 16, 4)))
        registry = server.metrics.registry
        for kind in DeviceMemory.__dataclass_fields__:
            assert registry.get_sample_value("expertd_device_memory_bytes", {"device": "0", "kind": kind}) == getattr(
                MEMORY, kind
            )
        busy = registry.get_sample_value("expertd_device_busy_seconds_total", {"device": "0"})
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
    assert series < 400


def test_balance_is_mean_over_largest_and_forgets() -> None:
    loads = ExpertLoads((3, 4), 2)
    loads.add(3, [10, 10], now=0.0)
    assert loads.balance() == {3: 1.0}
    loads.add(4, [10, 0], now=0.0)
    assert loads.balance()[4] == 0.5
    loads.add(4, [0, 5], now=HALF_LIFE)
    assert loads.balance()[4] == 1.0
    assert loads.pairs.tolist() == [[10, 10], [10, 5]]


def test_pairs_of_one_second_count_alike_and_old_ones_half_after_a_minute() -> None:
    loads = ExpertLoads((3,), 2)
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
    counted = {stage: _native.Histogram(LATENCY_BUCKETS) for stage in STAGES}
    # On a bound, on either side of it, beyond both ends.
    for spent in (0.0, 1e-6, 1e-5, 0.0025, 0.0025000001, 0.3, 10.0, 11.0):
        seconds = [spent * (1 + position) for position in range(len(STAGES))]
        for stage, value in zip(STAGES, seconds, strict=True):
            counted[stage].observe(value)
            like.labels(stage).observe(value)
    metrics.stages.set_function(
        lambda: (((stage,), buckets(LATENCY_BUCKETS, *one.read())) for stage, one in counted.items())
    )
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


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float:
    """As Prometheus has it: what lies in a bucket is spread evenly over it."""
    rank, below = share * sum(counts), 0
    for bound, lower, count in zip(bounds, (0.0, *bounds), counts, strict=False):
        if below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below += count
    return bounds[-1]


@pytest.mark.parametrize("median", [3e-5, 4e-4, 1.1e-3, 2.6e-3, 5.1e-3, 0.06, 0.5])
@pytest.mark.parametrize("spread", [0.05, 0.2, 0.5])
def test_a_p99_from_fine_buckets_is_near_the_true_one(median: float, spread: float) -> None:
    values = np.random.default_rng(9).lognormal(np.log(median), spread, 20000)
    histogram = _native.Histogram(FINE_BUCKETS)
    for value in values:
        histogram.observe(value)
    true, told = float(np.quantile(values, 0.99)), quantile(FINE_BUCKETS, histogram.read()[0], 0.99)
    assert abs(told / true - 1) < 0.25


def test_buckets_are_eight_a_decade_with_those_that_people_ask_for() -> None:
    assert len(FINE_BUCKETS) == 8 * 6 + 1
    assert max(upper / lower for lower, upper in pairwise(FINE_BUCKETS)) < 1.45
    assert set(map(floatToGoString, LATENCY_BUCKETS)) <= set(map(floatToGoString, FINE_BUCKETS))
    assert {stage for stage, bounds in STAGE_BUCKETS.items() if bounds is FINE_BUCKETS} == {"compute", "total"}


async def test_failures_have_a_duration_by_outcome(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, open_channel(server) as channel:
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await execute_method(channel)(request_for(server, random_batch(1, 256, 16, 4), layer=50))
        value = server.metrics.registry.get_sample_value
        assert value("expertd_failure_duration_seconds_count", {"outcome": "not_found"}) == 3
        assert 0 < (value("expertd_failure_duration_seconds_sum", {"outcome": "not_found"}) or 0) < 1
        assert value("expertd_failure_duration_seconds_count", {"outcome": "internal"}) is None


async def test_callers_are_told_apart_by_their_tokens(small_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("first\nsecond\n")
    async with running_server(small_model, ALL, auth_token_file=file) as server, open_channel(server) as channel:
        for token, tokens, layer in (("first", 4, 1), ("second", 2, 1), ("first", 3, 1), ("second", 1, 50)):
            bearer = (("authorization", f"Bearer {token}"),)
            request = request_for(server, random_batch(tokens, 256, 16, 4), layer=layer)
            with contextlib.suppress(grpc.aio.AioRpcError):
                await execute_method(channel)(request, metadata=bearer)
        value = server.metrics.registry.get_sample_value
        first, second = (f"token {hashlib.sha256(token).hexdigest()[:12]}" for token in (b"first", b"second"))
        for caller, tokens, refusals in ((first, 7, 0), (second, 2, 1), ("other", 0, 0)):
            assert value("expertd_caller_tokens_total", {"caller": caller}) == tokens
            assert value("expertd_caller_refusals_total", {"caller": caller}) == refusals


def test_a_callers_name_is_short_and_no_secret() -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    assert shown(f"token {digest}") == f"token {digest[:12]}"
    assert shown("ipv4:10.1.2.3") == "ipv4:10.1.2.3"
    assert shown("") == "unknown"
    assert len(shown("certificate " + "é" * 500)) == 64


def test_traced_requests_are_exemplars() -> None:
    provider = TracerProvider()
    turned, loads = HandTurned(), ExpertLoads((1, 2), 4)
    metrics = Metrics(CollectorRegistry())
    journal = Journal(metrics, turned.tally, loads, RequestTracer(provider))
    trace = "ab" * 16
    for number, traceparent in enumerate(
        (f"00-{trace}-{'12' * 8}-01", f"00-{'cd' * 16}-{'12' * 8}-00", "", "no-trace")
    ):
        turned.answer(message(number + 1), (0.0, 0.003, 0.0), traceparent=traceparent)
    journal.read()
    text = openmetrics.generate_latest(metrics.registry).decode()  # type: ignore[no-untyped-call]
    named = [line for line in text.splitlines() if "# {" in line]
    assert len(named) == len(STAGES)
    assert all(f'# {{trace_id="{trace}"}}' in line for line in named)
    (compute,) = (line for line in named if 'stage="compute"' in line)
    assert compute.startswith('expertd_stage_duration_seconds_bucket{le="0.0035",stage="compute"} 4.0 # {')
    # The other format has none.
    assert b"trace_id" not in generate_latest(metrics.registry)


def test_startup_phases_add_up() -> None:
    metrics = Metrics(CollectorRegistry())
    for _ in range(2):
        with adding_seconds(metrics.startup.labels("load")):
            pass
    assert (metrics.registry.get_sample_value("expertd_startup_seconds", {"phase": "load"}) or 0) > 0
