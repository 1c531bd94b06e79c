"""What becomes of one call of a layer, for metrics and traces."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from expertd.client.telemetry.metrics import CoordinatorMetrics, Waited
from expertd.client.telemetry.tracing import call_span, inside, trace_of
from expertd.proto.base.errors import ExpertdError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


class CallMeter:
    """Its time begins with it."""

    def __init__(self, metrics: CoordinatorMetrics, tracer: Tracer | None, layer: int) -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        self._span = call_span(tracer, layer)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Around everything that the call does: it has failed with what a block raises."""
        try:
            with inside(self._span):
                yield
        except ExpertdError as error:
            self._failed(error.code.name.lower())
            raise
        except asyncio.CancelledError:
            self._failed("cancelled")
            raise

    def answered(self, output: Tensor, degraded_tokens: int, waited: Callable[[], Waited]) -> Callable[[], None]:
        """End with an output [..., H], whose tokens lack experts where they are degraded; call what this returns for
        the metrics to have it, and to ask what was `waited`."""
        tokens, seconds = math.prod(output.shape[:-1]), time.perf_counter() - self._started
        trace = trace_of(self._span)
        self._end()
        return lambda: self._metrics.answered(tokens, degraded_tokens, seconds, waited(), trace)

    def _failed(self, outcome: str) -> None:
        self._metrics.failed(outcome)
        self._end()

    def _end(self) -> None:
        if self._span is not None:
            self._span.end()
