"""The fast pipeline for one token in three kernels."""

from __future__ import annotations

import math

from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch
from expertd.kernels.cutile.fast.layer import Workspace
from expertd.kernels.cutile.fast.tiles import LayerConfig
from expertd.kernels.cutile.single.activation import activation
from expertd.kernels.cutile.single.first_product import ROWS, first_product
from expertd.kernels.cutile.single.second_product import second_product
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch


def single_launches(
    batch: TokenBatch, weights: LayerWeights, sums: Tensor, workspace: Workspace, config: LayerConfig
) -> list[Launch]:
    """The kernels that compute `sums` [1, H] and `workspace.schedule.pairs` for a batch of one token, in order."""
    top_k, width = batch.expert_ids.shape[1], weights.down.shape[2]
    shape = (config.gemm1.splits, top_k, 2 * width)
    products = workspace.partial_up_gate[: math.prod(shape)].view(shape)
    inner = workspace.inner.view(-1)[: ROWS * top_k * width].view(ROWS * top_k, width)
    inner_scales = workspace.inner_scales[: top_k * width // BLOCK].view(top_k, -1)
    ids, pairs = batch.expert_ids, workspace.schedule.pairs
    first = (batch.hidden, batch.scales, ids, weights.up_gate, weights.up_gate_scales, products, config.gemm1)
    second = (inner, inner_scales, ids, batch.weights, weights.down, weights.down_scales, sums, config.gemm2)
    return [
        first_product(*first),
        activation(products, ids, inner, inner_scales, pairs, weights.swiglu_limit),
        second_product(*second),
    ]
