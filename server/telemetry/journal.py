"""What this server did, read from its engine's tally: for Prometheus, the log, traces and the status page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from expertd._native import Tally, Told
from expertd.proto.base.errors import OUTCOMES
from expertd.server.telemetry.exemplars import Exemplars
from expertd.server.telemetry.loads import ExpertLoads
from expertd.server.telemetry.metrics import FINE_BUCKETS, LATENCY_BUCKETS, STAGES, TOKEN_BUCKETS, Metrics, buckets
from expertd.server.telemetry.tracing import RequestTracer

log = logging.getLogger(__name__)
REMEMBERED_ANSWERS = 1000
READ_SECONDS = 0.1
"""Between two looks for requests to be told of."""
_NAMES = {code: name for name, code in OUTCOMES.items()}
STAGE_BUCKETS = {stage: FINE_BUCKETS if stage in ("compute", "total") else LATENCY_BUCKETS for stage in STAGES}
SHOWN = 64
"""Characters of a caller's name in labels."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One answered request, for the status page."""

    time: float
    """As `time.monotonic` tells it."""
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


def shown(identity: str) -> str:
    """A caller as a label: of a token's digest enough to tell it from others, and of what has no name, so much."""
    kind, _, name = identity.partition(" ")
    text = f"token {name[:12]}" if kind == "token" else identity or "unknown"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def make_tally(loads: ExpertLoads) -> Tally:
    """One that counts what metrics and pages show, for the layers and experts of `loads`."""
    return Tally(loads.layers, loads.num_experts, LATENCY_BUCKETS, TOKEN_BUCKETS, FINE_BUCKETS)


class Journal:
    """Reads a tally, whenever somebody asks and every now and then. Any thread may ask."""

    def __init__(self, metrics: Metrics, tally: Tally, loads: ExpertLoads, tracer: RequestTracer | None = None) -> None:
        self._tally = tally
        self._loads = loads
        self._tracer = tracer
        self._exemplars = Exemplars(STAGE_BUCKETS)
        self._listen()
        self._export(metrics)

    @property
    def answers(self) -> list[Answered]:
        """The latest, at most `REMEMBERED_ANSWERS`."""
        return [Answered(*answer) for answer in self._tally.answers()]

    @property
    def errors(self) -> list[Refused]:
        """The latest requests that were not answered."""
        return [Refused(told.time, _NAMES[told.code], told.caller, told.text) for told in self._tally.refusals()]

    @property
    def outcomes(self) -> dict[str, int]:
        """How often each came about, if it did."""
        return {name: count for name, code in OUTCOMES.items() if (count := self._tally.outcomes(code))}

    @property
    def in_flight(self) -> int:
        return self._tally.in_flight

    @property
    def loads(self) -> ExpertLoads:
        """As of now."""
        pairs = np.frombuffer(self._tally.expert_pairs(), np.int64)
        self._loads.update(pairs.reshape(self._loads.pairs.shape), time.monotonic())
        return self._loads

    def owned_shares(self) -> Iterator[tuple[tuple[int], tuple[float]]]:
        """Every expert that is owned, and the share of the layers in which it is."""
        owned = self._loads.owned
        layers = Counter(expert for experts in owned.values() for expert in experts)
        return (((expert,), (count / len(owned),)) for expert, count in sorted(layers.items()))

    async def run(self) -> None:
        """Tell log and traces of requests, until cancelled."""
        while True:
            self.read()
            await asyncio.sleep(READ_SECONDS)

    def read(self) -> None:
        """Tell log and traces of the requests that ended since the last time."""
        self._listen()
        ended, dropped = self._tally.take_told()
        for told in ended:
            self._tell(told)
        if dropped:
            log.warning("%d requests ended too fast to be told of", dropped)
        # Pairs age by when they are seen.
        _ = self.loads

    def _listen(self) -> None:
        self._tally.tell_of(everything=log.isEnabledFor(logging.DEBUG), traced=self._tracer is not None)

    def _tell(self, told: Told) -> None:
        outcome = _NAMES[told.code]
        fields: dict[str, str | int] = {"request_id": told.request_id, "caller": told.caller, "layer": told.layer}
        tracer = self._tracer if told.traceparent else None
        traceparent = str(told.traceparent, "ascii", "replace")
        if outcome == "ok":
            fields |= {"tokens": told.tokens, "pairs": told.pairs, "outcome": outcome}
            log.debug("request answered", extra={**fields, "seconds": told.seconds[-1]})
            if tracer is not None:
                seconds = dict(zip(STAGES, told.seconds, strict=True))
                tracer.answered(traceparent, fields, seconds, told.time)
                self._exemplars.add(traceparent, seconds, told.time)
            return
        fields["outcome"] = outcome
        log.debug("request refused: %s", told.text, extra=fields)
        if tracer is not None:
            tracer.refused(traceparent, fields, told.text, told.time)

    def _by_caller(self, which: int) -> Iterator[tuple[tuple[str], tuple[int]]]:
        """Tokens, or with 1 refusals."""
        # Those whose names look alike count together: a label can be there once only.
        counts = Counter({"other": self._tally.other_callers()[which]})
        for identity, *values in self._tally.callers():
            counts[shown(identity)] += values[which]
        return (((name,), (count,)) for name, count in counts.items())

    def _export(self, metrics: Metrics) -> None:
        tally = self._tally
        metrics.requests.set_function(lambda: (((name,), (tally.outcomes(code),)) for name, code in OUTCOMES.items()))
        metrics.evictions.set_function(lambda: [((), (tally.evictions,))])
        metrics.tokens.set_function(lambda: [((), (tally.tokens,))])
        metrics.pairs.set_function(lambda: [((), (tally.pairs,))])
        metrics.in_flight.set_function(lambda: tally.in_flight)
        metrics.stages.set_function(
            lambda: (
                ((stage,), buckets(STAGE_BUCKETS[stage], *read, self._exemplars.of(stage)))
                for stage, read in zip(STAGES, tally.stages(), strict=True)
            )
        )
        metrics.failures.set_function(
            lambda: (
                ((name,), buckets(LATENCY_BUCKETS, *tally.failure_seconds(code)))
                for name, code in OUTCOMES.items()
                if code and tally.outcomes(code)
            )
        )
        metrics.caller_tokens.set_function(lambda: self._by_caller(0))
        metrics.caller_refusals.set_function(lambda: self._by_caller(1))
        metrics.refusal.set_function(lambda: [((), buckets(LATENCY_BUCKETS, *tally.refusal_seconds()))])
        metrics.batch_tokens.set_function(lambda: [((), buckets(TOKEN_BUCKETS, *tally.batch_tokens()))])
        metrics.queue_wait.set_function(
            lambda: (
                ((layer,), wait)
                for index, layer in enumerate(self._loads.layers)
                if (wait := tally.queue_wait(index))[0]
            )
        )
        metrics.load_balance.set_function(
            lambda: (((layer,), (ratio,)) for layer, ratio in self.loads.balance().items())
        )
        metrics.expert_pairs.set_function(lambda: ((labels, (pairs,)) for labels, pairs in self.loads.by_expert()))
