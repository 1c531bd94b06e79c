"""Prometheus metrics of one server."""

from __future__ import annotations

import platform

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.registry import REGISTRY

from expertd import __version__
from expertd.proto.codec import StageTimings

LATENCY_BUCKETS = (*(mantissa * 10.0**decade for decade in range(-5, 1) for mantissa in (1.0, 2.5, 5.0)), 10.0)
"""Seconds, from 10 us to 10 s."""
TOKEN_BUCKETS = tuple(float(4**power) for power in range(9))
"""Tokens, from 1 to 65536."""


class Metrics:
    """The collectors; `registry` lets tests have their own."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.registry = registry
        self.requests = Counter(
            "expertd_requests", "Requests by outcome: ok, or the gRPC status.", ["outcome"], registry=registry
        )
        self._stage = Histogram(
            "expertd_stage_duration_seconds",
            "Seconds that a request spent in each stage; total is from its arrival to its encoded answer.",
            ["stage"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
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
        self.queue_tokens = Gauge("expertd_queue_tokens", "Tokens waiting for the device.", registry=registry)
        self.in_flight = Gauge("expertd_requests_in_flight", "Requests being answered.", registry=registry)
        self.weights_bytes = Gauge("expertd_weights_bytes", "Bytes of expert weights loaded.", registry=registry)
        self.shared_memory_bytes = Gauge(
            "expertd_shared_memory_bytes", "Bytes of callers' memory mapped here.", registry=registry
        )
        self.layers_loaded = Gauge("expertd_layers_loaded", "Layers whose weights are loaded.", registry=registry)
        self._info = Info("expertd_build", "What is running.", registry=registry)
        self.outcomes_from_start()

    def outcomes_from_start(self) -> None:
        """Export the series that alerts divide by before their first event."""
        self.requests.labels("ok")
        for stage in (*StageTimings.__dataclass_fields__, "encode", "total"):
            self._stage.labels(stage)

    def describe(self, backend: str, device: str, model_fingerprint: str) -> None:
        self._info.info(
            {
                "version": __version__,
                "python": platform.python_version(),
                "backend": backend,
                "device": device,
                "model_fingerprint": model_fingerprint,
            }
        )

    def observe_answer(self, tokens: int, pairs: int, timings: StageTimings, encode: float, total: float) -> None:
        """Record one answered request; all times in seconds."""
        self.requests.labels("ok").inc()
        self.tokens.inc(tokens)
        self.pairs.inc(pairs)
        for stage in StageTimings.__dataclass_fields__:
            self._stage.labels(stage).observe(getattr(timings, stage))
        self._stage.labels("encode").observe(encode)
        self._stage.labels("total").observe(total)
