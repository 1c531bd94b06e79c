"""The shadow check: now and then one token of an answered request is computed again from the checkpoint's files."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import random
import threading
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from torch import Tensor

from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.oracle.golden import expert_reference
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import read_expert
from expertd.server.scheduling.shard import Shard

log = logging.getLogger(__name__)
WAITING = 8
"""Tokens that may wait for the check; further ones are dropped."""
BOUNDS = {"torch": 5e-3, "cutile": 6e-2}
"""Relative error of one token, by backend: replies may be BF16, and cutile rounds BF16 hidden states to FP8 as well."""
ERROR_BUCKETS = (*(mantissa * 10.0**decade for decade in range(-7, 0) for mantissa in (1.0, 3.0)), 1.0)


@dataclass(frozen=True, slots=True)
class _Sample:
    layer: int
    token: TokenBatch
    """One token, with local expert ids."""
    answer: Tensor
    """[1, H] as it was sent."""


class ShadowCheck:
    """Checks on a thread of its own; never makes a request wait."""

    def __init__(
        self, checkpoint: Checkpoint, shard: Shard, backend: str, rate: float, registry: CollectorRegistry
    ) -> None:
        """`rate` is the share of requests of which a token is checked."""
        self._checkpoint = checkpoint
        self._shard = shard
        self._bound = BOUNDS[backend]
        self._rate = rate
        self._samples: queue.Queue[_Sample | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="shadow-check", daemon=True)
        self._errors = Histogram(
            "expertd_shadow_relative_error",
            "Relative error of single tokens against the reference from the checkpoint.",
            buckets=ERROR_BUCKETS,
            registry=registry,
        )
        self._checks = Counter(
            "expertd_shadow_checks",
            "Sampled tokens by outcome: ok, mismatch, dropped because the check was busy, or failed to be computed.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("ok", "mismatch", "dropped", "failed"):
            self._checks.labels(outcome)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Wait for the check that is running and forget those that wait."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._samples.get_nowait()
        self._samples.put(None)
        self._thread.join()

    def offer(self, layer: int, batch: TokenBatch, answer: Tensor) -> None:
        """Perhaps check a token of `batch` (local expert ids) and its `answer` [T, H]. Copies what it keeps."""
        if random.random() >= self._rate:
            return
        row = slice(index := random.randrange(batch.num_tokens), index + 1)
        scales = None if batch.scales is None else _copy(batch.scales[row])
        token = TokenBatch(_copy(batch.hidden[row]), scales, _copy(batch.expert_ids[row]), _copy(batch.weights[row]))
        try:
            self._samples.put_nowait(_Sample(layer, token, _copy(answer[row])))
        except queue.Full:
            self._checks.labels("dropped").inc()

    def _run(self) -> None:
        while (sample := self._samples.get()) is not None:
            try:
                self._check(sample)
            except Exception:
                # The checkpoint may be out of reach for a while; serving does not depend on it.
                log.exception("the shadow check of a token of layer %d failed", sample.layer)
                self._checks.labels("failed").inc()

    def _check(self, sample: _Sample) -> None:
        expected = sample.answer.float().new_zeros(sample.answer.shape)
        chosen = [local for local in sample.token.expert_ids[0].tolist() if local >= 0]
        for local in chosen:
            matrices = read_expert(self._checkpoint, sample.layer, self._shard.experts[local])
            expected += expert_reference(sample.token, local, matrices)
        error = relative_error(sample.answer, expected)
        self._errors.observe(math.inf if math.isnan(error) else error)
        if error <= self._bound:
            self._checks.labels("ok").inc()
            return
        self._checks.labels("mismatch").inc()
        log.error(
            "shadow check: layer %d, experts %s: relative error %.3g exceeds %g; run 'expertd verify' on this server",
            sample.layer,
            [self._shard.experts[local] for local in chosen],
            error,
            self._bound,
        )


def _copy(tensor: Tensor) -> Tensor:
    """In host memory."""
    return tensor.to("cpu", copy=True)
