"""The shadow check: now and then one token of an answered request is computed again from the checkpoint's files."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import random
import threading
from dataclasses import dataclass

from torch import Tensor

from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.oracle.golden import expert_reference
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import read_expert
from expertd.server.scheduling.shard import Shard
from expertd.server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)
WAITING = 8
"""Tokens that may wait for the check; further ones are dropped."""
BOUNDS = {"torch": 5e-3, "cutile": 6e-2}
"""Relative error of one token, by backend: replies may be BF16, and cutile rounds BF16 hidden states to FP8 as well."""


@dataclass(frozen=True, slots=True)
class _Sample:
    layer: int
    token: TokenBatch
    """One token, with local expert ids."""
    answer: Tensor
    """[1, H] as it was sent."""


class ShadowCheck:
    """Checks on a thread of its own; never makes a request wait."""

    def __init__(self, checkpoint: Checkpoint, shard: Shard, backend: str, rate: float, metrics: Metrics) -> None:
        """`rate` is the share of requests of which a token is checked."""
        self._checkpoint = checkpoint
        self._shard = shard
        self._bound = BOUNDS[backend]
        self._rate = rate
        self._samples: queue.Queue[_Sample | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="shadow-check", daemon=True)
        self._metrics = metrics
        metrics.export(metrics.shadow_errors, metrics.shadow_checks)

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
            self._metrics.shadow_checks.labels("dropped").inc()

    def _run(self) -> None:
        while (sample := self._samples.get()) is not None:
            try:
                self._check(sample)
            except Exception:
                # The checkpoint may be out of reach for a while; serving does not depend on it.
                log.exception("the shadow check of a token of layer %d failed", sample.layer)
                self._metrics.shadow_checks.labels("failed").inc()

    def _check(self, sample: _Sample) -> None:
        expected = sample.answer.float().new_zeros(sample.answer.shape)
        chosen = [local for local in sample.token.expert_ids[0].tolist() if local >= 0]
        for local in chosen:
            matrices = read_expert(self._checkpoint, sample.layer, self._shard.experts[local])
            expected += expert_reference(sample.token, local, matrices)
        error = relative_error(sample.answer, expected)
        self._metrics.shadow_errors.observe(math.inf if math.isnan(error) else error)
        if error <= self._bound:
            self._metrics.shadow_checks.labels("ok").inc()
            return
        self._metrics.shadow_checks.labels("mismatch").inc()
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
