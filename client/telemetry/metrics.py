"""Prometheus metrics of the coordinators of one program."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from expertd.proto.base.errors import OUTCOMES

CALL_BUCKETS = (*(mantissa * 10.0**decade for decade in range(-4, 1) for mantissa in (1.0, 2.5, 5.0)), 10.0, 60.0)
"""Seconds, from 100 us to a minute."""
SERVER_BUCKETS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0)


class CoordinatorMetrics:
    """What coordinators do; one object may serve several of them.

    `registry` exports them, such as `prometheus_client.REGISTRY`; without one they are counted but shown nowhere.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._calls = Counter(
            "expertd_coordinator_calls",
            "Calls of a layer by outcome: ok, or the gRPC status of the error that was raised.",
            ["outcome"],
            registry=registry,
        )
        # Exported before their first event: without a zero to begin with, nobody sees the first one.
        for outcome in OUTCOMES:
            self._calls.labels(outcome)
        self._seconds = Histogram(
            "expertd_coordinator_call_duration_seconds",
            "Seconds of each answered call, from its arguments to its output.",
            buckets=CALL_BUCKETS,
            registry=registry,
        )
        self._tokens = Counter("expertd_coordinator_tokens", "Tokens of answered calls.", registry=registry)
        self._servers = Histogram(
            "expertd_coordinator_fan_out_servers",
            "Servers that a call was first sent to.",
            buckets=SERVER_BUCKETS,
            registry=registry,
        )
        self._retries = Counter(
            "expertd_coordinator_retries", "Parts of calls sent again after an attempt failed.", registry=registry
        )
        self._failovers = Counter(
            "expertd_coordinator_failovers",
            "Retries that went to a server other than the one that failed.",
            registry=registry,
        )
        self._hedges = Counter(
            "expertd_coordinator_hedges",
            "Parts of calls sent to a second server while the first one had not answered yet.",
            registry=registry,
        )
        self._degraded = Counter(
            "expertd_coordinator_degraded_tokens",
            "Tokens answered without some of their experts, as their caller allowed.",
            registry=registry,
        )
        self._background = Counter(
            "expertd_coordinator_background_errors",
            "Failures of what finds and watches servers in the background, each logged as an error; it begins again.",
            registry=registry,
        )

    def answered(self, tokens: int, degraded: int, seconds: float) -> None:
        """A call of `tokens` tokens has its output; `degraded` of them lack experts."""
        self._calls.labels("ok").inc()
        self._tokens.inc(tokens)
        self._degraded.inc(degraded)
        self._seconds.observe(seconds)

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

    def background_failed(self) -> None:
        """What runs in the background failed, and begins again if it goes on for ever."""
        self._background.inc()
