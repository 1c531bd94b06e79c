"""Prometheus metrics of one server: declared here, told where it happens; docs/metrics.md has a line for each."""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Summary
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector
from prometheus_client.utils import floatToGoString

from expertd.proto.base.errors import OUTCOMES
from expertd.proto.base.tasks import Tasks
from expertd.proto.codec import StageTimings

LATENCY_BUCKETS = (*(mantissa * 10.0**decade for decade in range(-5, 1) for mantissa in (1.0, 2.5, 5.0)), 10.0)
"""Seconds, from 10 us to 10 s."""
TOKEN_BUCKETS = tuple(float(4**power) for power in range(9))
"""Tokens, from 1 to 65536."""
ERROR_BUCKETS = (*(mantissa * 10.0**decade for decade in range(-7, 0) for mantissa in (1.0, 3.0)), 1.0)
"""Relative errors, from 1e-7 to 1."""
SHADOW_OUTCOMES = ("ok", "mismatch", "dropped", "failed")
STAGES = (*StageTimings._fields, "encode", "total")


class Metrics:
    """Every series of a server, each an attribute; `registry` lets tests have their own.

    Whoever knows tells the series itself: `inc`, `observe`, `set`, `info`, or `set_function` to be asked at scrapes.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.requests = Counter(
            "expertd_requests", "Requests by outcome: ok, or the gRPC status.", ["outcome"], registry=registry
        )
        self.stages = StageSeconds()
        self.refusal = Histogram(
            "expertd_refusal_duration_seconds",
            "Seconds from a request's arrival to its RESOURCE_EXHAUSTED.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.tokens = Counter("expertd_tokens", "Tokens of answered requests.", registry=registry)
        self.pairs = Counter("expertd_pairs", "(token, expert) pairs of answered requests.", registry=registry)
        self.batch_tokens = Histogram(
            "expertd_batch_tokens", "Tokens of each device batch.", buckets=TOKEN_BUCKETS, registry=registry
        )
        self.queue_wait = Summary(
            "expertd_queue_wait_seconds",
            "Seconds from a request's entry into the queue to the start of its batch.",
            ["layer"],
            registry=registry,
        )
        self.queue_tokens = Gauge("expertd_queue_tokens", "Tokens waiting for the device.", registry=registry)
        self.queue_capacity = Gauge(
            "expertd_queue_capacity_tokens", "Tokens that may wait before requests are refused.", registry=registry
        )
        self.ready = Gauge(
            "expertd_ready", "1 while requests are accepted, 0 while starting or draining.", registry=registry
        )
        self.in_flight = Gauge("expertd_requests_in_flight", "Requests being answered.", registry=registry)
        self.weights_bytes = Gauge("expertd_weights_bytes", "Bytes of expert weights loaded.", registry=registry)
        self.shared_memory_bytes = Gauge(
            "expertd_shared_memory_bytes", "Bytes of callers' memory mapped here.", registry=registry
        )
        self.front_ends = Gauge("expertd_front_ends", "Front ends that listen.", registry=registry)
        self.layers_loaded = Gauge("expertd_layers_loaded", "Layers whose weights are loaded.", registry=registry)
        self.startup = Gauge(
            "expertd_startup_seconds",
            "Seconds that the start spent waiting for each of its phases.",
            ["phase"],
            registry=registry,
        )
        self.rpcs = Counter(
            "grpc_server_handled",
            "RPCs that ended, by method and gRPC status; a stream ends once.",
            ["grpc_type", "grpc_service", "grpc_method", "grpc_code"],
            registry=registry,
        )
        self.background_errors = Counter(
            "expertd_background_errors",
            "Failures of what the server does in the background, each logged as an error.",
            registry=registry,
        )
        self.background_restarts = Counter(
            "expertd_background_restarts",
            "Times that what goes on for ever in the background began again after a failure.",
            registry=registry,
        )
        self.build = Info("expertd_build", "What is running.", registry=registry)
        self.placement = Info("expertd_placement", "What is owned.", registry=registry)
        self.load_balance = Asked(
            GaugeMetricFamily,
            "expertd_load_balance_ratio",
            "Mean over largest load of this server's experts, of the last minutes: 1 is even, 1/experts is worst.",
            ["layer"],
        )
        self.export(self.stages, self.load_balance)

        # What not every server has: `export` it where it is there.
        self.expert_pairs = Asked(
            CounterMetricFamily, "expertd_expert_pairs", "(token, expert) pairs computed.", ["layer", "expert"]
        )
        self.device_busy = Counter(
            "expertd_device_busy_seconds", "Seconds in which the GPU computed batches.", registry=None
        )
        self.device_memory = Gauge(
            "expertd_device_memory_bytes",
            "GPU memory: size, free, allocated to tensors, reserved by the process for tensors.",
            ["kind"],
            registry=None,
        )
        self.shadow_errors = Histogram(
            "expertd_shadow_relative_error",
            "Relative error of single tokens against the reference from the checkpoint.",
            buckets=ERROR_BUCKETS,
            registry=None,
        )
        self.shadow_checks = Counter(
            "expertd_shadow_checks",
            "Sampled tokens by outcome: ok, mismatch, dropped because the check was busy, or failed to be computed.",
            ["outcome"],
            registry=None,
        )

        # Exported before their first event: without a zero to begin with, nobody sees the first one.
        for series, outcomes in ((self.requests, OUTCOMES), (self.shadow_checks, SHADOW_OUTCOMES)):
            for outcome in outcomes:
                series.labels(outcome)

    def new_tasks(self) -> Tasks:
        """Background tasks whose failures and new beginnings are counted."""
        return Tasks(self.background_errors.inc, self.background_restarts.inc)

    def export(self, *series: Collector) -> None:
        """Let scrapes see series that not every server has."""
        for collector in series:
            self.registry.register(collector)


@contextlib.contextmanager
def adding_seconds(gauge: Gauge) -> Iterator[None]:
    """Add what the block takes."""
    started = time.perf_counter()
    yield
    gauge.inc(time.perf_counter() - started)


class StageSeconds(Collector):
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


class Asked(Collector):
    """One labelled series for each value that a function tells at a scrape, so that requests do not pay for them."""

    def __init__(
        self,
        family: type[CounterMetricFamily | GaugeMetricFamily],
        name: str,
        documentation: str,
        labels: Sequence[str],
    ) -> None:
        self._family = partial(family, name, documentation, labels=labels)
        self._function: Callable[[], Iterable[tuple[tuple[int, ...], float]]] = tuple

    def set_function(self, function: Callable[[], Iterable[tuple[tuple[int, ...], float]]]) -> None:
        """Ask `function` for values by their labels."""
        self._function = function

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        for labels, value in self._function():
            family.add_metric([*map(str, labels)], value)
        yield family
