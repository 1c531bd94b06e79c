"""What one scrape costs with everything on, of the largest shard."""

import gzip
import time
from collections.abc import Callable

import pytest
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from expertd.proto.base.errors import OUTCOMES
from expertd.server.hardware.gpu_health import GpuHealth
from expertd.server.scheduling import gpu_watch
from expertd.server.scheduling.gpu_watch import GpuWatch
from expertd.server.telemetry.journal import Journal
from expertd.server.telemetry.loads import ExpertLoads
from expertd.server.telemetry.metrics import LATENCY_BUCKETS, Metrics, buckets
from expertd.server.telemetry.tracing import RequestTracer
from tests.support.native.hand_turned import HandTurned, message
from tests.support.native.stand_in_nvml import UUID, StandInNvml

LAYERS, EXPERTS = tuple(range(1, 59)), tuple(range(32))
BYTES = 1 << 20
MOST = 2.0
"""Times what gauges of as many lines take that have nothing to find out first: 30 to 60 ms, by the machine."""


def everything() -> Metrics:
    """Of a server whose layers, callers and buckets have all had something."""
    turned, loads, metrics = (
        HandTurned(layers=LAYERS, experts=EXPERTS),
        ExpertLoads(LAYERS, len(EXPERTS)),
        Metrics(CollectorRegistry()),
    )
    journal = Journal(metrics, turned.tally, loads, RequestTracer(TracerProvider()))
    for number, layer in enumerate(LAYERS, 1):
        traced = f"00-{number:032x}-{number:016x}-01"
        identity = f"certificate [b'spiffe://cluster.example/ns/serving/sa/engine-{number}']"
        turned.submit(message(number, layer=layer), traceparent=traced, identity=identity)
        turned.turn()
        batch = turned.fetch()
        batch.finish([1, *[0] * 31], *[10 ** (number % 7 - 5)] * 3)
        turned.turn()
    journal.read()
    # Every outcome, as if each had come about.
    failed = buckets(LATENCY_BUCKETS, [1] * (len(LATENCY_BUCKETS) + 1), 1.0)
    metrics.failures.set_function(lambda: (((name,), failed) for name in OUTCOMES if name != "ok"))
    metrics.export(metrics.expert_pairs, metrics.device_busy, metrics.device_memory)
    metrics.device_busy.set_function(lambda: [((0,), (0.5,))])
    metrics.export(metrics.shadow_errors, metrics.shadow_checks)
    health = GpuHealth.open(StandInNvml(), UUID)
    assert health is not None
    gpu_watch.export(metrics, {0: GpuWatch(0, health, metrics, lambda _: None)})
    return metrics


def gauges(lines: int) -> CollectorRegistry:
    registry = CollectorRegistry()
    gauge = Gauge("gauge", "Nothing.", ["layer", "expert"], registry=registry)
    for line in range(lines):
        gauge.labels(str(line // 32), str(line % 32)).set(line / 7)
    return registry


def spent(encode: Callable[[CollectorRegistry], bytes], *registries: CollectorRegistry) -> list[float]:
    """Of each, in turn, the least seconds of this thread's, as the machine has others to serve."""
    took: list[list[float]] = [[] for _ in registries]
    for _ in range(20):
        for registry, its in zip(registries, took, strict=True):
            started = time.thread_time()
            encode(registry)
            its.append(time.thread_time() - started)
    return [min(its) for its in took]


@pytest.mark.parametrize("encode", [generate_latest, openmetrics.generate_latest])
def test_a_scrape_of_58_layers_of_32_experts_is_quick_and_small(encode: Callable[[CollectorRegistry], bytes]) -> None:
    registry = everything().registry
    text = encode(registry)
    seconds, plain = spent(encode, registry, gauges(text.count(b"\n")))
    assert text.count(b"expertd_expert_pairs_total{") == 58 * 32
    assert text.count(b"expertd_caller_tokens_total{") == 17
    print(
        f"{encode.__module__}: {seconds * 1e3:.1f} ms, {seconds / plain:.2f} times as long as gauges;"
        f" {len(text)} bytes, {len(gzip.compress(text))} compressed"
    )
    assert seconds < MOST * plain
    assert len(text) < BYTES
