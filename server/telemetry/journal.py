"""What this server did, told by the handlers once: for Prometheus, the log, traces and the status page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expertd.proto.base.errors import ExpertdError, Overloaded
from expertd.proto.codec import ExecuteCall, RawRequest, StageTimings
from expertd.server.telemetry.loads import ExpertLoads
from expertd.server.telemetry.metrics import STAGES, Metrics
from expertd.server.telemetry.tracing import RequestTracer

log = logging.getLogger(__name__)
REMEMBERED_ANSWERS = 1000
REMEMBERED_ERRORS = 20


@dataclass(frozen=True, slots=True)
class Answered:
    """One answered request, for the status page."""

    time: float
    """Unix time in seconds."""
    tokens: int
    seconds: tuple[float, ...]
    """Of each of `metrics.STAGES`."""


@dataclass(frozen=True, slots=True)
class Refused:
    """One request that was not answered, for the status page."""

    time: float
    """Unix time in seconds."""
    outcome: str
    caller: str
    message: str


class Journal:
    """Counts every request and remembers the latest. Written on the event loop; `answers` and `errors` may be copied
    by other threads."""

    def __init__(self, metrics: Metrics, loads: ExpertLoads, tracer: RequestTracer | None = None) -> None:
        self._metrics = metrics
        self._loads = loads
        self._tracer = tracer
        self.answers: deque[Answered] = deque(maxlen=REMEMBERED_ANSWERS)
        self.outcomes: Counter[str] = Counter()
        self.in_flight = 0
        self.errors: deque[Refused] = deque(maxlen=REMEMBERED_ERRORS)
        self._answered = metrics.requests.labels("ok")
        metrics.in_flight.set_function(lambda: self.in_flight)
        metrics.load_balance.set_function(lambda: (((layer,), ratio) for layer, ratio in loads.balance().items()))
        metrics.expert_pairs.set_function(loads.by_expert)

    @contextlib.contextmanager
    def request(self, request: RawRequest, caller: str) -> Iterator[None]:
        """While a request is being answered; what leaves the block as an exception is recorded."""
        arrived = time.perf_counter()
        self.in_flight += 1
        try:
            yield
        except ExpertdError as error:
            self._refused(request, caller, error.code.name.lower(), str(error))
            if isinstance(error, Overloaded):
                self._metrics.refusal.observe(time.perf_counter() - arrived)
            raise
        except asyncio.CancelledError:
            self._refused(request, caller, "cancelled", "the caller gave up")
            raise
        finally:
            self.in_flight -= 1

    def answered(
        self,
        call: ExecuteCall,
        caller: str,
        pairs: npt.NDArray[np.integer[Any]],
        timings: StageTimings,
        encode: float,
        total: float,
    ) -> None:
        """Record an answer; `pairs` by local expert, times in seconds."""
        seconds = (*timings, encode, total)
        tokens, num_pairs = call.hidden.shape[0], sum(pairs.tolist())
        self._answered.inc()
        self._metrics.tokens.inc(tokens)
        self._metrics.pairs.inc(num_pairs)
        self._metrics.stages.observe(seconds)
        self.outcomes["ok"] += 1
        self._loads.add(call.layer, pairs, time.monotonic())
        self.answers.append(Answered(time.time(), tokens, seconds))
        traced = self._tracer is not None and call.traceparent
        if not traced and not log.isEnabledFor(logging.DEBUG):
            return
        fields: dict[str, str | int] = {"request_id": call.request_id, "caller": caller, "layer": call.layer}
        fields |= {"tokens": tokens, "pairs": num_pairs, "outcome": "ok"}
        log.debug("request answered", extra={**fields, "seconds": total})
        if self._tracer is not None and traced:
            self._tracer.answered(call.traceparent, fields, dict(zip(STAGES, seconds, strict=True)))

    def _refused(self, request: RawRequest, caller: str, outcome: str, message: str) -> None:
        self._metrics.requests.labels(outcome).inc()
        self.outcomes[outcome] += 1
        self.errors.append(Refused(time.time(), outcome, caller, message))
        fields: dict[str, str | int] = {"request_id": request.request_id, "caller": caller, "layer": request.layer}
        fields["outcome"] = outcome
        log.debug("request refused: %s", message, extra=fields)
        if self._tracer is not None and request.traceparent:
            self._tracer.refused(str(request.traceparent, "ascii", "replace"), fields, message)
