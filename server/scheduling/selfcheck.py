"""The test that a server runs on its own weights before it says that it is healthy."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from expertd.kernels.numerics.backend import FEW_TOKENS, Backend, TokenBatch
from expertd.kernels.numerics.quantize import quantize_activations
from expertd.kernels.oracle.golden import expert_reference
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.experts import ExpertMatrices

BOUND = 3e-2
"""Largest relative error: one FP8 rounding of the intermediate alone gives about 2.6e-2."""


class SelfCheckFailed(Exception):
    """The backend's result disagrees with the FP32 reference."""


def self_check(backend: Backend, layer: int, experts: Mapping[int, ExpertMatrices], *, serving: bool = False) -> float:
    """Compare `backend` on random tokens with the reference of `experts`: local ids, and what their files hold.

    `FEW_TOKENS` for each. Called on the device thread after `load_layer`; `serving`: an engine computes meanwhile.
    Returns the largest relative error of an expert; raises `SelfCheckFailed` beyond `BOUND`.
    """
    worst = 0.0
    for local, matrices in experts.items():
        generator = torch.Generator().manual_seed(layer)
        hidden, scales = quantize_activations(
            torch.randn(FEW_TOKENS, matrices.down.shape[0], generator=generator, dtype=torch.float32)
        )
        ids = torch.full((FEW_TOKENS, 1), local, dtype=torch.int32)
        batch = TokenBatch(
            hidden, scales, ids, torch.rand(FEW_TOKENS, 1, generator=generator, dtype=torch.float32) + 0.5
        )
        if serving:
            sums = backend.compute_beside(layer, batch)
        else:
            (sums,) = backend.submit(layer, [batch], torch.float32).result().sums
        error = relative_error(sums, expert_reference(batch, local, matrices))
        if not error <= BOUND:
            raise SelfCheckFailed(
                f"self-check of layer {layer} on backend {backend.name} failed: relative error {error:.3g} exceeds"
                f" {BOUND}; the checkpoint, the GPU or its driver is at fault: try --backend torch to tell them apart"
            )
        worst = max(worst, error)
    return worst
