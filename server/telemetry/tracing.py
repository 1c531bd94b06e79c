"""OpenTelemetry spans of requests that their callers trace, made from the times that are measured anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from expertd.server.options.config import InvalidOption, ServerConfig
from expertd.server.telemetry.metrics import STAGES

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span
    from opentelemetry.trace import TracerProvider as AnyProvider

EXPORT_SECONDS = 5.0
MAX_INT = 2**63 - 1
Attributes = Mapping[str, str | int]


def make_provider(config: ServerConfig) -> TracerProvider | None:
    """What sends spans to `--trace-endpoint`. Raises `InvalidOption` when OpenTelemetry is not installed."""
    if config.trace_endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidOption(f"--trace-endpoint needs OpenTelemetry: pip install 'expertd[otel]' ({error})") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "expertd"}))
    exporter = OTLPSpanExporter(config.trace_endpoint, timeout=EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class RequestTracer:
    """Makes the spans of a request when it is over: one of the request, one of each of its stages."""

    def __init__(self, provider: AnyProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("expertd.server")
        self._propagator = TraceContextTextMapPropagator()

    def answered(self, traceparent: str, attributes: Attributes, seconds: Mapping[str, float], ended: float) -> None:
        """A request ended at the Unix time `ended` that took `seconds`: total, and by stage, laid end to end."""
        from opentelemetry.trace import set_span_in_context

        end = _nanoseconds(ended)
        begin = end - _nanoseconds(seconds["total"])
        span = self._start(traceparent, attributes, begin)
        if span is None:
            return
        within = set_span_in_context(span)
        for stage in STAGES[:-1]:
            stage_end = begin + _nanoseconds(seconds[stage])
            self._tracer.start_span(f"expertd.{stage}", within, start_time=begin).end(stage_end)
            begin = stage_end
        span.end(end)

    def refused(self, traceparent: str, attributes: Attributes, message: str, ended: float) -> None:
        """A request ended at the Unix time `ended` in an error."""
        from opentelemetry.trace import Status, StatusCode

        span = self._start(traceparent, attributes, _nanoseconds(ended))
        if span is not None:
            span.set_status(Status(StatusCode.ERROR, message))
            span.end(_nanoseconds(ended))

    def _start(self, traceparent: str, attributes: Attributes, begin: int) -> Span | None:
        """A child of the caller's span; None when that is malformed or not sampled."""
        from opentelemetry.trace import SpanKind, get_current_span

        caller = self._propagator.extract({"traceparent": traceparent})
        if not get_current_span(caller).get_span_context().trace_flags.sampled:
            return None
        sent = {name: _sendable(value) for name, value in attributes.items()}
        return self._tracer.start_span("expertd.request", caller, SpanKind.SERVER, sent, start_time=begin)


def _sendable(value: str | int) -> str | int:
    """OTLP's integers have 64 bits with a sign, and request ids 64 without: those beyond go as text."""
    return str(value) if isinstance(value, int) and value > MAX_INT else value


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
