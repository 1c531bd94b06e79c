"""Prometheus metrics of the coordinators of one program."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from expertd.client.telemetry.attempts import Attempts
from expertd.client.telemetry.balance import Balance, Loads
from expertd.proto.base.buckets import eight_a_decade
from expertd.proto.base.errors import OUTCOMES

ATTEMPT_BUCKETS = (*(mantissa * 10.0**decade for decade in range(-4, 1) for mantissa in (1.0, 2.5, 5.0)), 10.0, 60.0)
"""Seconds, from 100 us to a minute: few, as there is one for each server, transport and outcome."""
CALL_BUCKETS = (*eight_a_decade(-4, 1), 60.0)
"""The same, so fine that a quantile is mostly off by less than a tenth."""
SIZES = (8, 128, 2048)
"""Tokens: the largest of each class of latency but the last, from decoding one sequence to prefills."""
SIZE_NAMES = ("1-8", "9-128", "129-2048", "2049+")
SIZED_BUCKETS = tuple(mantissa * 10.0**decade for decade in range(-3, 1) for mantissa in (1.0, 2.5, 5.0))
"""Seconds; objectives are among them."""
WHERE = ("coordinator", "network", "queue", "device")
SERVER_BUCKETS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0)
STANDINGS = ("in_use", "unavailable", "another_model", "other_weights")
"""What a server is to a coordinator; one of other weights differs from a replica of its model."""
Ends: TypeAlias = Callable[[], Mapping[str, float]]


class Fleet(Protocol):
    """The servers of one coordinator. Any thread."""

    def standings(self) -> Mapping[str, int]:
        """How many there are of each of `STANDINGS`."""

    def count_ownerless(self) -> int:
        """Experts, counted in each layer, that had a server and have none in use."""

    def loads(self) -> Loads:
        """What the servers computed lately that own experts of a layer, those that computed nothing too."""


class Waited(NamedTuple):
    """For the slowest of a call's servers, in seconds: from sending to the answer, and what the server says of it."""

    all: float
    queue: float
    device: float


class CoordinatorMetrics:
    """What coordinators do; one object may serve several of them.

    `registry` exports them, such as `prometheus_client.REGISTRY`; without one they are counted but shown nowhere.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        counter, histogram = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        self._late: deque[Callable[[], None]] = deque()
        if registry is not None:
            # Before the others, which are then right.
            registry.register(_Before(self._count_late))
        self._calls = counter(
            "expertd_coordinator_calls",
            "Calls of a layer by outcome: ok, or the gRPC status of the error that was raised.",
            ["outcome"],
        )
        # Exported before their first event: without a zero to begin with, nobody sees the first one.
        for outcome in OUTCOMES:
            self._calls.labels(outcome)
        self._ok = self._calls.labels("ok")
        self._seconds = histogram(
            "expertd_coordinator_call_duration_seconds",
            "Seconds of each answered call, from its arguments to its output.",
            buckets=CALL_BUCKETS,
        )
        sized = histogram(
            "expertd_coordinator_sized_call_duration_seconds",
            "Seconds of each answered call, by its number of tokens: what is asked of latency depends on that.",
            ["tokens"],
            buckets=SIZED_BUCKETS,
        )
        self._sized = [sized.labels(name) for name in SIZE_NAMES]
        Gauge(
            "expertd_coordinator_ownerless_experts",
            "Experts, counted in each layer, that had a server and have none in use.",
            registry=registry,
        ).set_function(self._ownerless)
        times = counter(
            "expertd_coordinator_time_seconds",
            "Seconds of answered calls by where they went: the coordinator itself, and of the slowest server of each"
            " call the wait for its device, the device, and the rest, which is the network's.",
            ["where"],
        )
        self._coordinator, self._network, self._queue, self._device = map(times.labels, WHERE)
        self.attempts = Attempts(registry, ATTEMPT_BUCKETS)
        self._tokens = counter("expertd_coordinator_tokens", "Tokens of answered calls.")
        self._servers = histogram(
            "expertd_coordinator_fan_out_servers", "Servers that a call was first sent to.", buckets=SERVER_BUCKETS
        )
        self._retries = counter("expertd_coordinator_retries", "Parts of calls sent again after an attempt failed.")
        self._failovers = counter(
            "expertd_coordinator_failovers", "Retries that went to a server other than the one that failed."
        )
        self._hedges = counter(
            "expertd_coordinator_hedges",
            "Parts of calls sent to a second server while the first one had not answered yet.",
        )
        self._degraded = counter(
            "expertd_coordinator_degraded_tokens",
            "Tokens answered without some of their experts, as their caller allowed.",
        )
        self._followed: dict[Fleet, Ends] = {}
        servers = Gauge(
            "expertd_coordinator_servers",
            "Servers by what they are to coordinators: in_use, or why not.",
            ["standing"],
            registry=registry,
        )
        for standing in STANDINGS:
            servers.labels(standing).set_function(partial(self._count, standing))
        if registry is not None:
            registry.register(_Certificates(self._followed.values))
            registry.register(Balance(lambda: [fleet.loads() for fleet in tuple(self._followed)]))
        self._background = counter(
            "expertd_coordinator_background_errors",
            "Failures of what finds and watches servers in the background, each logged as an error; it begins again.",
        )
        self._restarts = counter(
            "expertd_coordinator_background_restarts",
            "Times that what finds and watches servers in the background began again after a failure.",
        )

    def later(self, count: Callable[[], None]) -> None:
        """Have the running event loop count something once it has gone on with what waits for it; any scrape has it."""
        self._late.append(count)
        asyncio.get_running_loop().call_soon(self._count_late)

    def _count_late(self) -> None:
        """Any thread."""
        while True:
            try:
                count = self._late.popleft()
            except IndexError:
                return
            count()

    def answered(self, tokens: int, degraded: int, seconds: float, waited: Waited, trace: str) -> None:
        """A call of `tokens` tokens has its output; `degraded` of them lack experts.

        `trace` is the id of its trace if that is sampled, else empty.
        """
        self._ok.inc()
        self._tokens.inc(tokens)
        self._degraded.inc(degraded)
        self._seconds.observe(seconds, {"trace_id": trace} if trace else None)
        self._sized[bisect_left(SIZES, tokens)].observe(seconds)
        self._coordinator.inc(max(0.0, seconds - waited.all))
        self._network.inc(max(0.0, waited.all - waited.queue - waited.device))
        self._queue.inc(waited.queue)
        self._device.inc(waited.device)

    def failed(self, outcome: str) -> None:
        """A call raised an error."""
        self._calls.labels(outcome).inc()

    def fan_out(self, servers: int) -> None:
        """A call was planned for `servers` servers."""
        self._servers.observe(servers)

    def spent(self, retries: int, failovers: int, hedges: int) -> None:
        """What a call took beside its first attempts, whatever became of it."""
        self._retries.inc(retries)
        self._failovers.inc(failovers)
        self._hedges.inc(hedges)

    def follow(self, fleet: Fleet, certificate_ends: Ends) -> None:
        """Ask one more fleet at scrapes, on any thread; also when its certificates end, in Unix time by file."""
        self._followed[fleet] = certificate_ends

    def part(self, fleet: Fleet) -> None:
        """End what `follow` began."""
        del self._followed[fleet]

    def _count(self, standing: str) -> int:
        return sum(fleet.standings().get(standing, 0) for fleet in tuple(self._followed))

    def _ownerless(self) -> int:
        return sum(fleet.count_ownerless() for fleet in tuple(self._followed))

    def background_failed(self) -> None:
        """What runs in the background failed, and begins again if it goes on for ever."""
        self._background.inc()

    def background_restarted(self) -> None:
        """What goes on for ever in the background began again."""
        self._restarts.inc()


class _Before(Collector):
    """Has something done before a scrape."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do

    def collect(self) -> Iterator[GaugeMetricFamily]:
        self._do()
        return iter(())


class _Certificates(Collector):
    """When the first certificate of each file ends; no series for a file that there is not."""

    def __init__(self, ends: Callable[[], Iterable[Ends]]) -> None:
        self._ends = ends

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "expertd_coordinator_certificate_expiry_timestamp_seconds",
            "Unix time from which on a certificate of the file is not valid.",
            labels=["file"],
        )
        told = [item for ends in tuple(self._ends()) for item in ends().items()]
        for file in sorted({file for file, _ in told}):
            family.add_metric([file], min(end for name, end in told if name == file))
        yield family
