"""Prometheus metrics of one server: declared here, told where it happens; docs/metrics.md has a line for each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Summary
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import REGISTRY, Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from expertd.proto.base.buckets import eight_a_decade
from expertd.proto.base.tasks import Tasks
from expertd.proto.codec import StageTimings

LATENCY_BUCKETS = (*(mantissa * 10.0**decade for decade in range(-5, 1) for mantissa in (1.0, 2.5, 5.0)), 10.0)
"""Seconds, from 10 us to 10 s."""
FINE_BUCKETS = eight_a_decade(-5, 1)
"""The same, so fine that a quantile is mostly off by less than a tenth."""
TOKEN_BUCKETS = tuple(float(4**power) for power in range(9))
"""Tokens, from 1 to 65536."""
ERROR_BUCKETS = (*(mantissa * 10.0**decade for decade in range(-7, 0) for mantissa in (1.0, 3.0)), 1.0)
"""Relative errors, from 1e-7 to 1."""
STAGES = (*StageTimings._fields, "encode", "total")
Family: TypeAlias = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily | SummaryMetricFamily
Labels: TypeAlias = tuple[int | str, ...]
NO_EXEMPLARS: Mapping[int, Exemplar] = {}


class Metrics:
    """Every series of a server, each an attribute; `registry` lets tests have their own.

    Whoever knows tells the series itself: `inc`, `observe`, `set`, `info`, or `set_function` to be asked at scrapes.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        gauge, counter = partial(Gauge, registry=registry), partial(Counter, registry=registry)
        self.requests = Asked(
            CounterMetricFamily, "expertd_requests", "Requests by outcome: ok, or the gRPC status.", ["outcome"]
        )
        self.stages = Asked(
            HistogramMetricFamily,
            "expertd_stage_duration_seconds",
            "Seconds that a request spent in each stage; total is from its arrival to its encoded answer.",
            ["stage"],
        )
        self.failures = Asked(
            HistogramMetricFamily,
            "expertd_failure_duration_seconds",
            "Seconds from a request's arrival to its error, by the error's gRPC status; none that never came about.",
            ["outcome"],
        )
        self.caller_tokens = Asked(
            CounterMetricFamily,
            "expertd_caller_tokens",
            "Tokens of answered requests by caller: those who ask most by name, others together.",
            ["caller"],
        )
        self.caller_refusals = Asked(
            CounterMetricFamily,
            "expertd_caller_refusals",
            "Requests that ended in an error, but for those given up by their callers; by caller.",
            ["caller"],
        )
        self.refusal = Asked(
            HistogramMetricFamily,
            "expertd_refusal_duration_seconds",
            "Seconds from a request's arrival to its RESOURCE_EXHAUSTED, evictions aside.",
        )
        self.evictions = Asked(
            CounterMetricFamily,
            "expertd_evictions",
            "Requests that left a full queue for one of a caller that had less in it.",
        )
        self.tokens = Asked(CounterMetricFamily, "expertd_tokens", "Tokens of answered requests.")
        self.pairs = Asked(CounterMetricFamily, "expertd_pairs", "(token, expert) pairs of answered requests.")
        self.batch_tokens = Asked(HistogramMetricFamily, "expertd_batch_tokens", "Tokens of each device batch.")
        self.queue_wait = Asked(
            SummaryMetricFamily,
            "expertd_queue_wait_seconds",
            "Seconds from a request's entry into the queue to the start of its batch.",
            ["layer"],
        )
        self.queue_tokens = gauge("expertd_queue_tokens", "Tokens waiting for the device.")
        self.queue_capacity = gauge(
            "expertd_queue_capacity_tokens", "Tokens that may wait before requests are refused."
        )
        self.ready = gauge("expertd_ready", "1 while requests are accepted, 0 while starting or draining.")
        self.in_flight = gauge("expertd_requests_in_flight", "Requests being answered.")
        self.weights_bytes = gauge("expertd_weights_bytes", "Bytes of expert weights held.")
        self.shared_memory_bytes = gauge("expertd_shared_memory_bytes", "Bytes of callers' memory mapped here.")
        self.layers_loaded = gauge("expertd_layers_loaded", "Layers whose weights serve: loaded and checked.")
        self.startup = gauge(
            "expertd_startup_seconds", "Seconds that the start spent waiting for each of its phases.", ["phase"]
        )
        self.rpcs = counter(
            "grpc_server_handled",
            "RPCs that ended, by method and gRPC status; a stream ends once.",
            ["grpc_type", "grpc_service", "grpc_method", "grpc_code"],
        )
        self.background_errors = counter(
            "expertd_background_errors", "Failures of what the server does in the background, each logged as an error."
        )
        self.background_restarts = counter(
            "expertd_background_restarts",
            "Times that what goes on for ever in the background began again after a failure.",
        )
        self.security_file_errors = counter(
            "expertd_security_file_errors",
            "Looks at changed certificates or tokens that cannot be used; the former ones stay in force.",
        )
        self.certificates = Asked(
            GaugeMetricFamily,
            "expertd_certificate_expiry_timestamp_seconds",
            "Unix time from which on a certificate of the file is not valid.",
            ["file"],
        )
        self.log_lines_dropped = Asked(
            CounterMetricFamily,
            "expertd_log_lines_dropped",
            "Lines of the log that were dropped because nobody read them.",
        )
        self.build = Info("expertd_build", "What is running.", registry=registry)
        self.placement = Info("expertd_placement", "What is owned.", registry=registry)
        self.placement_epoch = gauge(
            "expertd_placement_epoch", "When what is owned was last changed: Unix time in us, as GetShard tells it."
        )
        self.owned = Asked(
            GaugeMetricFamily,
            "expertd_expert_owned",
            "Share of the layers in which an expert is owned: of it rules tell which experts no server of a fleet has.",
            ["expert"],
        )
        self.load_balance = Asked(
            GaugeMetricFamily,
            "expertd_load_balance_ratio",
            "Mean over largest load of this server's experts, of the last minutes: 1 is even, 1/experts is worst.",
            ["layer"],
        )
        self.export(self.requests, self.stages, self.refusal, self.evictions, self.tokens, self.pairs)
        self.export(self.failures, self.caller_tokens, self.caller_refusals, self.certificates, self.owned)
        self.export(self.batch_tokens, self.queue_wait, self.load_balance, self.log_lines_dropped)

        # What not every server has: `export` it where it is there.
        self.updates = Counter(
            "expertd_placement_updates",
            "Changes of what is owned by outcome: ok, the error's gRPC status, or cancelled before anything changed.",
            ["outcome"],
            registry=None,
        )
        self.updates_in_flight = Gauge(
            "expertd_placement_updates_in_flight", "Changes of what is owned that are under way.", registry=None
        )
        self.update_seconds = Summary(
            "expertd_placement_update_seconds",
            "Seconds of changes of what is owned, until the former weights were freed.",
            registry=None,
        )
        self.update_bytes = Counter(
            "expertd_placement_update_read_bytes", "Bytes of weights read for changes of what is owned.", registry=None
        )
        self.generation_share = Asked(
            GaugeMetricFamily,
            "expertd_generation_share",
            "Share of calls that should use the weights with this fingerprint, of those that are here.",
            ["model_fingerprint"],
        )
        self.staged_bytes = Gauge(
            "expertd_generation_staged_bytes",
            "Bytes of the weights that are held beside those that serve.",
            registry=None,
        )
        self.expert_pairs = Asked(
            CounterMetricFamily, "expertd_expert_pairs", "(token, expert) pairs computed.", ["layer", "expert"]
        )
        self.device_busy = Asked(
            CounterMetricFamily, "expertd_device_busy_seconds", "Seconds in which the GPU computed batches.", ["device"]
        )
        self.device_stages = Asked(
            CounterMetricFamily,
            "expertd_device_stage_seconds",
            "Seconds that batches spent in each stage on each of several devices.",
            ["device", "stage"],
        )
        self.device_failures = Asked(
            CounterMetricFamily,
            "expertd_device_failed_batches",
            "Batches, or parts of them, that one of several devices failed to compute.",
            ["device"],
        )
        self.device_lost = Asked(
            GaugeMetricFamily,
            "expertd_device_lost",
            "1 once one of several devices is lost: what it alone had is not owned any more.",
            ["device"],
        )
        self.device_adding = Asked(
            CounterMetricFamily,
            "expertd_device_adding_seconds",
            "Seconds in which the sums of several devices were added up.",
        )
        self.device_memory = Gauge(
            "expertd_device_memory_bytes",
            "GPU memory: size, free, allocated to tensors, reserved by the process for tensors.",
            ["device", "kind"],
            registry=None,
        )
        self.gpu_temperature = Asked(
            GaugeMetricFamily, "expertd_gpu_temperature_celsius", "Temperature of the GPU.", ["device"]
        )
        self.gpu_throttled = Asked(
            GaugeMetricFamily,
            "expertd_gpu_throttled",
            "1 while clocks are lowered for this reason.",
            ["device", "reason"],
        )
        self.gpu_ecc_errors = Asked(
            CounterMetricFamily,
            "expertd_gpu_ecc_errors",
            "ECC errors of the GPU's memory since the driver was loaded.",
            ["device", "kind"],
        )
        self.gpu_links = Asked(
            GaugeMetricFamily, "expertd_gpu_nvlinks", "NVLinks of the GPU, up or down.", ["device", "state"]
        )
        self.gpu_link_errors = Asked(
            CounterMetricFamily,
            "expertd_gpu_nvlink_errors",
            "Errors of all NVLinks of the GPU, by kind.",
            ["device", "kind"],
        )
        self.gpu_xids = Counter(
            "expertd_gpu_xid_errors",
            "Errors of the GPU that its driver reported, by number.",
            ["device", "xid"],
            registry=None,
        )
        self.shadow_errors = Histogram(
            "expertd_shadow_relative_error",
            "Relative error of single tokens against the reference from the checkpoint.",
            buckets=ERROR_BUCKETS,
            registry=None,
        )
        self.shadow_checks = Asked(
            CounterMetricFamily,
            "expertd_shadow_checks",
            "Sampled tokens by outcome: ok, mismatch, dropped because the check was busy, or failed to be computed.",
            ["outcome"],
        )

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


class Asked(Collector):
    """Series whose values a function tells at a scrape, so that requests do not pay for them."""

    def __init__(
        self, family: Callable[..., Family], name: str, documentation: str, labels: Sequence[str] = ()
    ) -> None:
        self._family = partial(family, name, documentation, labels=labels)
        self._function: Callable[[], Iterable[tuple[Labels, tuple[Any, ...]]]] = tuple

    def set_function(self, function: Callable[[], Iterable[tuple[Labels, tuple[Any, ...]]]]) -> None:
        """Ask `function` for labels and what is of them: a number, count and sum, or `buckets`."""
        self._function = function

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        for labels, values in self._function():
            family.add_metric([*map(str, labels)], *values)
        yield family


def buckets(
    bounds: Sequence[float], counts: Sequence[int], total: float, exemplars: Mapping[int, Exemplar] = NO_EXEMPLARS
) -> tuple[list[tuple[Any, ...]], float]:
    """A histogram as Prometheus has it, from how many values lie within each bound but no lower one, and their sum.

    `exemplars` are values by the index of their bucket.
    """
    found: list[tuple[Any, ...]] = list(zip([*map(floatToGoString, bounds), "+Inf"], accumulate(counts), strict=True))
    for index, exemplar in exemplars.items():
        found[index] = (*found[index], exemplar)
    return found, total
