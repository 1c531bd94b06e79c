"""Prometheus metrics of one server; docs/metrics.md has a line for each."""

from __future__ import annotations

import contextlib
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from wsgiref.types import WSGIApplication

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, make_wsgi_app
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector
from prometheus_client.utils import floatToGoString

from expertd.kernels.model.ranges import format_ranges
from expertd.kernels.numerics.backend import DeviceMemory
from expertd.proto.base.errors import OUTCOMES
from expertd.proto.codec import ShardInfo, StageTimings
from expertd.server.telemetry.loads import ExpertLoads

LATENCY_BUCKETS = (*(mantissa * 10.0**decade for decade in range(-5, 1) for mantissa in (1.0, 2.5, 5.0)), 10.0)
"""Seconds, from 10 us to 10 s."""
TOKEN_BUCKETS = tuple(float(4**power) for power in range(9))
"""Tokens, from 1 to 65536."""
STAGES = (*StageTimings.__dataclass_fields__, "encode", "total")


class Metrics:
    """The collectors; `registry` lets tests have their own."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self._requests = Counter(
            "expertd_requests", "Requests by outcome: ok, or the gRPC status.", ["outcome"], registry=registry
        )
        # Exported before their first event: without a zero to begin with, nobody sees the first one.
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._answered = self._requests.labels("ok")
        self._stages = _StageSeconds()
        registry.register(self._stages)
        self.refusal = Histogram(
            "expertd_refusal_duration_seconds",
            "Seconds from a request's arrival to its RESOURCE_EXHAUSTED.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._tokens = Counter("expertd_tokens", "Tokens of answered requests.", registry=registry)
        self._pairs = Counter("expertd_pairs", "(token, expert) pairs of answered requests.", registry=registry)
        self._batch_tokens = Histogram(
            "expertd_batch_tokens", "Tokens of each device batch.", buckets=TOKEN_BUCKETS, registry=registry
        )
        self._queue_tokens = Gauge("expertd_queue_tokens", "Tokens waiting for the device.", registry=registry)
        self._queue_capacity = Gauge(
            "expertd_queue_capacity_tokens", "Tokens that may wait before requests are refused.", registry=registry
        )
        self._ready = Gauge(
            "expertd_ready", "1 while requests are accepted, 0 while starting or draining.", registry=registry
        )
        self._in_flight = Gauge("expertd_requests_in_flight", "Requests being answered.", registry=registry)
        self.weights_bytes = Gauge("expertd_weights_bytes", "Bytes of expert weights loaded.", registry=registry)
        self.shared_memory_bytes = Gauge(
            "expertd_shared_memory_bytes", "Bytes of callers' memory mapped here.", registry=registry
        )
        self.front_ends = Gauge("expertd_front_ends", "Front ends that listen.", registry=registry)
        self.layers_loaded = Gauge("expertd_layers_loaded", "Layers whose weights are loaded.", registry=registry)
        self._startup = Gauge(
            "expertd_startup_seconds",
            "Seconds that the start spent waiting for each of its phases.",
            ["phase"],
            registry=registry,
        )
        self._rpcs = Counter(
            "grpc_server_handled",
            "RPCs that ended, by method and gRPC status; a stream ends once.",
            ["grpc_type", "grpc_service", "grpc_method", "grpc_code"],
            registry=registry,
        )
        self._build = Info("expertd_build", "What is running.", registry=registry)
        self._placement = Info("expertd_placement", "What is owned.", registry=registry)
        self._device_busy: Counter | None = None

    def application(self) -> WSGIApplication:
        """What answers scrapes."""
        return make_wsgi_app(self.registry)

    def describe(self, info: ShardInfo) -> None:
        """Say what runs here and what it owns."""
        self._build.info(
            {
                "version": info.version,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "backend": info.backend,
                "device": info.device,
            }
        )
        self._placement.info(
            {
                "model_fingerprint": info.model_fingerprint,
                "layers": format_ranges(info.layers),
                "experts": format_ranges(info.experts),
            }
        )

    def watch(
        self,
        *,
        queue_tokens: Callable[[], int],
        queue_capacity: int,
        in_flight: Callable[[], int],
        ready: Callable[[], bool],
    ) -> None:
        """Ask the functions at every scrape."""
        self._queue_tokens.set_function(queue_tokens)
        self._queue_capacity.set(queue_capacity)
        self._in_flight.set_function(in_flight)
        self._ready.set_function(ready)

    def watch_loads(self, loads: ExpertLoads, per_expert: bool) -> None:
        """Export the balance of every layer, and with `per_expert` a series for every expert of every layer."""
        self.registry.register(_LoadCollector(loads, per_expert))

    def watch_device(self) -> Callable[[DeviceMemory], None]:
        """Export what only a GPU has: seconds in which it computed, and its memory as last told to the result."""
        self._device_busy = Counter(
            "expertd_device_busy_seconds", "Seconds in which the GPU computed batches.", registry=self.registry
        )
        memory = Gauge(
            "expertd_device_memory_bytes",
            "GPU memory: size, free, allocated to tensors, reserved by the process for tensors.",
            ["kind"],
            registry=self.registry,
        )

        def tell(found: DeviceMemory) -> None:
            for kind in DeviceMemory.__dataclass_fields__:
                memory.labels(kind).set(getattr(found, kind))

        return tell

    @contextlib.contextmanager
    def startup_phase(self, phase: str) -> Iterator[None]:
        """Add what the block takes to a phase of the start."""
        started = time.perf_counter()
        yield
        self._startup.labels(phase).inc(time.perf_counter() - started)

    def count_request(self, outcome: str) -> None:
        self._requests.labels(outcome).inc()

    def count_rpc(self, kind: str, service: str, method: str, code: str, by: int = 1) -> None:
        """Count an ended RPC; `by` 0 exports the series before the first one."""
        self._rpcs.labels(kind, service, method, code).inc(by)

    def observe_answer(self, tokens: int, pairs: int, seconds: Sequence[float]) -> None:
        """Record one answered request, with its seconds in each of `STAGES`."""
        self._answered.inc()
        self._tokens.inc(tokens)
        self._pairs.inc(pairs)
        self._stages.observe(seconds)

    def observe_batch(self, tokens: int, compute: float) -> None:
        """Record one device batch that was computed in `compute` seconds."""
        self._batch_tokens.observe(tokens)
        if self._device_busy is not None:
            self._device_busy.inc(compute)


class _StageSeconds(Collector):
    """A histogram for each of `STAGES`, written on the event loop for every answer.

    The library's histograms would take a lock and look at every bucket, for every stage, while the caller waits.
    """

    def __init__(self) -> None:
        self._counts = [[0] * (len(LATENCY_BUCKETS) + 1) for _ in STAGES]
        self._sums = [0.0] * len(STAGES)

    def observe(self, seconds: Sequence[float]) -> None:
        for stage, spent in enumerate(seconds):
            self._counts[stage][bisect_left(LATENCY_BUCKETS, spent)] += 1
            self._sums[stage] += spent

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "expertd_stage_duration_seconds",
            "Seconds that a request spent in each stage; total is from its arrival to its encoded answer.",
            labels=["stage"],
        )
        bounds = [*map(floatToGoString, LATENCY_BUCKETS), "+Inf"]
        for stage, counts, total in zip(STAGES, self._counts, self._sums, strict=True):
            family.add_metric([stage], list(zip(bounds, accumulate(counts), strict=True)), total)
        yield family


class _LoadCollector(Collector):
    """Reads the loads when it is scraped, so that requests do not pay for the series."""

    def __init__(self, loads: ExpertLoads, per_expert: bool) -> None:
        self._loads = loads
        self._per_expert = per_expert

    def collect(self) -> Iterator[Metric]:
        balance = GaugeMetricFamily(
            "expertd_load_balance_ratio",
            "Mean over largest load of this server's experts, of the last minutes: 1 is even, 1/experts is worst.",
            labels=["layer"],
        )
        for layer, ratio in self._loads.balance().items():
            balance.add_metric([str(layer)], ratio)
        yield balance
        if self._per_expert:
            pairs = CounterMetricFamily(
                "expertd_expert_pairs", "(token, expert) pairs computed.", labels=["layer", "expert"]
            )
            experts = tuple(map(str, self._loads.experts))
            for layer, row in zip(self._loads.layers, self._loads.pairs.tolist(), strict=True):
                for expert, count in zip(experts, row, strict=True):
                    pairs.add_metric([str(layer), expert], count)
            yield pairs
