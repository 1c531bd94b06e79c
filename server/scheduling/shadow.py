"""The shadow check: now and then one token of an answered request is computed again from the checkpoint's files."""

from __future__ import annotations

import logging
import math
import random
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from expertd._native import Sample, Sampler
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.oracle.golden import expert_reference
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.experts import ExpertMatrices
from expertd.proto.codec import DTYPES
from expertd.server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)
BOUNDS = {"torch": 5e-3, "cutile": 6e-2}
"""Relative error of one token, by backend: replies may be BF16, and cutile rounds BF16 hidden states to FP8 as well."""
FLUSHED = 448 * 2.0**-126
"""A right value that is smaller may be zero: the scale of an FP8 block of such values, a 448th of the largest, is below
FP32's smallest normal number, and devices may take that for zero. BF16 has but a few coarse numbers there."""
STOP_SECONDS = 1.0
"""For a check that is running: its files may be out of reach."""


class ShadowCheck:
    """Checks on a thread of its own; never makes a request wait."""

    def __init__(
        self, read: Callable[[str, int, int], ExpertMatrices | None], backend: str, rate: float, metrics: Metrics
    ) -> None:
        """`read` gets an expert of a layer of the weights with a fingerprint, None once they were released; `rate` is
        the share of requests of which a token is checked."""
        self.read = read
        self._bound = BOUNDS[backend]
        self.sampler = Sampler(rate, random.getrandbits(31))
        """For the engine."""
        # Without zeros to begin with, nobody sees the first of a kind.
        self._outcomes = dict.fromkeys(("ok", "mismatch", "failed", "dropped"), 0)
        self._thread = threading.Thread(target=self._run, name="shadow-check", daemon=True)
        self._errors = metrics.shadow_errors
        metrics.shadow_checks.set_function(lambda: (((name,), (count,)) for name, count in self._counted().items()))
        metrics.export(metrics.shadow_errors, metrics.shadow_checks)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Forget the checks that wait, and the one that is running when it takes long."""
        self.sampler.interrupt()
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while (sample := self.sampler.take()) is not None:
            try:
                self._outcomes[self._check(sample.model_fingerprint, sample.layer, *tensors_of(sample))] += 1
            except Exception:
                # The checkpoint may be out of reach for a while; serving does not depend on it.
                log.exception("the shadow check of a token of layer %d failed", sample.layer)
                self._outcomes["failed"] += 1

    def _counted(self) -> dict[str, int]:
        return self._outcomes | {"dropped": self._outcomes["dropped"] + self.sampler.dropped}

    def _check(self, fingerprint: str, layer: int, token: TokenBatch, answer: Tensor) -> str:
        """The outcome."""
        expected = answer.float().new_zeros(answer.shape)
        unsure = torch.full_like(expected, FLUSHED)
        ids, weights = token.expert_ids[0].tolist(), token.weights[0].tolist()
        chosen = {expert: weight for expert, weight in zip(ids, weights, strict=True) if expert >= 0}
        for expert, weight in chosen.items():
            matrices = self.read(fingerprint, layer, expert)
            if matrices is None:
                return "dropped"
            expected += expert_reference(token, expert, matrices)
            # Of what goes into down_proj; it is weighed before or after.
            unsure += FLUSHED * max(1.0, abs(weight)) * matrices.down.abs().sum(1)
        error = _error(answer, expected, unsure)
        self._errors.observe(math.inf if math.isnan(error) else error)
        if error <= self._bound:
            return "ok"
        log.error(
            "shadow check: layer %d, experts %s: relative error %.3g exceeds %g; run 'expertd verify' on this server",
            layer,
            list(chosen),
            error,
            self._bound,
        )
        return "mismatch"


def _error(answer: Tensor, expected: Tensor, unsure: Tensor) -> float:
    """Relative, of differences beyond what is `unsure`; what callers send that is not finite must not come back finite,
    and says nothing else of the server."""
    finite = expected.isfinite()
    if answer[~finite].isfinite().any():
        return math.inf
    wanted = expected[finite].double()
    beyond = ((answer[finite] - wanted).abs() - unsure[finite]).clamp(min=0.0)
    return relative_error(wanted + beyond, wanted)


def tensors_of(sample: Sample) -> tuple[TokenBatch, Tensor]:
    """The token, with global expert ids, and its answer [1, H] as it was sent."""

    def row(data: bytearray, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(data, dtype=dtype).view(1, -1)

    scales = row(sample.scales, torch.float32) if sample.scales else None
    ids, weights = row(sample.ids, torch.int32), row(sample.weights, torch.float32)
    token = TokenBatch(row(sample.hidden, DTYPES[sample.hidden_dtype]), scales, ids, weights)
    return token, row(sample.sums, DTYPES[sample.sums_dtype])
