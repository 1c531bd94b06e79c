"""The oracle: the experts' formula written plainly, in full precision, for everything else to be compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import dequantize_activations, dequantize_weights
from expertd.kernels.numerics.swiglu import swiglu


def reference_partials(batch: TokenBatch, weights: LayerWeights, dtype: torch.dtype = torch.float64) -> Tensor:
    """Partial sums [T, H] of `batch`: sum over its experts of w * swiglu(x up^T, x gate^T) down^T.

    Inputs are dequantised exactly and all arithmetic is in `dtype`. One expert's weights are dequantised at a time.
    """
    if batch.scales is None:
        hidden = batch.hidden.to(dtype)
    else:
        hidden = dequantize_activations(batch.hidden, batch.scales).to(dtype)
    sums = torch.zeros_like(hidden)
    for expert in range(weights.num_experts):
        token, choice = (batch.expert_ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        up_gate = dequantize_weights(weights.up_gate[expert], weights.up_gate_scales[expert]).to(dtype)
        down = dequantize_weights(weights.down[expert], weights.down_scales[expert]).to(dtype)
        up, gate = (hidden[token] @ up_gate.T).chunk(2, dim=-1)
        sums.index_add_(
            0, token, swiglu(up, gate, weights.swiglu_limit) @ down.T * batch.weights[token, choice, None].to(dtype)
        )
    return sums


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference|| over all elements, in float64; 0 when both are zero."""
    difference = (out.double() - reference.double()).norm()
    return 0.0 if difference == 0 else float(difference / reference.double().norm())
