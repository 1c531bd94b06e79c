"""The test that a server runs on its own weights before it says that it is healthy."""

from __future__ import annotations

import torch

from expertd.kernels.numerics.backend import Backend, LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import quantize_activations
from expertd.kernels.oracle.reference import reference_partials, relative_error

TOKENS = 8
BOUND = 3e-2
"""Largest relative error: one FP8 rounding of the intermediate alone gives about 2.6e-2."""


class SelfCheckFailed(Exception):
    """The backend's result disagrees with the FP32 reference."""


def self_check(backend: Backend, layer: int, weights: LayerWeights) -> float:
    """Compare `backend` with the reference on random tokens for two experts, other ones on every layer.

    Called on the device thread after `load_layer`. Returns the relative error; raises `SelfCheckFailed` beyond `BOUND`.
    """
    generator = torch.Generator().manual_seed(layer)
    hidden_size = weights.down.shape[1]
    hidden, scales = quantize_activations(torch.randn(TOKENS, hidden_size, generator=generator))
    first = layer % weights.num_experts
    second = (layer + weights.num_experts // 2) % weights.num_experts
    # One expert a token, which every model allows.
    ids = torch.full((TOKENS, 1), first, dtype=torch.int32)
    ids[::2] = second
    batch = TokenBatch(hidden, scales, ids, torch.rand(TOKENS, 1, generator=generator) + 0.5)
    computed = backend.submit(layer, [batch], torch.float32).result()
    error = relative_error(computed.sums[0], reference_partials(batch, weights, torch.float32))
    if not error <= BOUND:
        raise SelfCheckFailed(
            f"self-check of layer {layer} on backend {backend.name} failed: relative error {error:.3g} exceeds {BOUND};"
            " the checkpoint, the GPU or its driver is at fault: try --backend torch to tell them apart"
        )
    return error
