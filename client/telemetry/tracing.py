"""OpenTelemetry spans of calls, for programs that give their coordinators a tracer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

NOTHING = nullcontext()
UNTRACED = nullcontext("")
ATTEMPT, ADDRESS = "expertd.attempt", "server.address"


def call_span(tracer: Tracer | None, layer: int) -> Span | None:
    """A span of one call of a layer; without a tracer, nothing."""
    return None if tracer is None else tracer.start_span("expertd.call", attributes={"layer": layer})


def inside(span: Span | None) -> AbstractContextManager[object]:
    """What is begun in the block is part of `span`, and what it raises the fault of it."""
    if span is None:
        return NOTHING
    from opentelemetry.trace import use_span

    return use_span(span)


def trace_of(span: Span | None) -> str:
    """The id of its trace; empty when that is not sampled."""
    if span is None or not (context := span.get_span_context()).trace_flags.sampled:
        return ""
    return f"{context.trace_id:032x}"


class AttemptSpans:
    """A span of what one call asks of each of several servers."""

    def __init__(self, tracer: Tracer, addresses: Sequence[str]) -> None:
        """Of those that get nothing, none is ever told."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        self._spans = {
            address: tracer.start_span(ATTEMPT, kind=SpanKind.CLIENT, attributes={ADDRESS: address})
            for address in addresses
        }
        self.trace = next((trace_of(span) for span in self._spans.values()), "")
        """The id of the call's trace; empty when that is not sampled."""
        self.traceparents = [_traceparent(span, set_span_in_context(span)) for span in self._spans.values()]

    def end(self, address: str, tokens: int, error: Exception | None = None) -> None:
        """Do nothing when called again for one of them."""
        from opentelemetry.trace import Status, StatusCode

        span = self._spans.pop(address, None)
        if span is not None:
            span.set_attribute("tokens", tokens)
            if error is not None:
                span.record_exception(error)
                span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
            span.end()


def attempt_span(tracer: Tracer | None, address: str, tokens: int) -> AbstractContextManager[str]:
    """A span around one request to a server; gives the W3C traceparent to send along, empty when it is not sampled."""
    return UNTRACED if tracer is None else _attempt_span(tracer, address, tokens)


@contextlib.contextmanager
def _attempt_span(tracer: Tracer, address: str, tokens: int) -> Iterator[str]:
    from opentelemetry.trace import SpanKind

    attributes: dict[str, str | int] = {ADDRESS: address, "tokens": tokens}
    with tracer.start_as_current_span(ATTEMPT, kind=SpanKind.CLIENT, attributes=attributes) as span:
        yield _traceparent(span)


def _traceparent(span: Span, context: Context | None = None) -> str:
    """Empty when the span is not sampled."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    if span.get_span_context().trace_flags.sampled:
        TraceContextTextMapPropagator().inject(carrier, context)
    return carrier.get("traceparent", "")
