"""OpenTelemetry spans of calls, for programs that give their coordinators a tracer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

NOTHING = nullcontext()
UNTRACED = nullcontext("")


def call_span(tracer: Tracer | None, layer: int) -> AbstractContextManager[object]:
    """A span around one call of a layer; without a tracer, nothing."""
    return NOTHING if tracer is None else tracer.start_as_current_span("expertd.call", attributes={"layer": layer})


def attempt_span(tracer: Tracer | None, address: str, tokens: int) -> AbstractContextManager[str]:
    """A span around one request to a server; gives the W3C traceparent to send along, empty when it is not sampled."""
    return UNTRACED if tracer is None else _attempt_span(tracer, address, tokens)


@contextlib.contextmanager
def _attempt_span(tracer: Tracer, address: str, tokens: int) -> Iterator[str]:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    attributes: dict[str, str | int] = {"server.address": address, "tokens": tokens}
    with tracer.start_as_current_span("expertd.attempt", kind=SpanKind.CLIENT, attributes=attributes) as span:
        carrier: dict[str, str] = {}
        if span.get_span_context().trace_flags.sampled:
            TraceContextTextMapPropagator().inject(carrier)
        yield carrier.get("traceparent", "")
