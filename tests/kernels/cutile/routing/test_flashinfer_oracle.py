"""The oracle that GPU tests use, at a size that a CPU computes: two descriptions of one layer agree."""

from dataclasses import replace

import torch

from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.routing import route
from expertd.kernels.oracle.reference import reference_partials, relative_error
from tests.support.kernels.flashinfer_oracle import moe_fp8_block_scale_ds_routing

CPU = torch.device("cpu")


def test_agrees_with_the_reference() -> None:
    shape, first_expert, model_experts = ExpertShape(8, 384, 256), 24, 64
    generator = torch.Generator().manual_seed(7)
    weights = random_weights(shape, CPU, generator)
    batch = random_batch(shape, 33, CPU, generator)
    assert batch.scales is not None
    logits = torch.randn(33, model_experts, generator=generator)
    bias = torch.randn(model_experts, generator=generator) / 10
    expected = moe_fp8_block_scale_ds_routing(
        logits,
        bias,
        batch.hidden,
        batch.scales.T,
        weights.up_gate,
        weights.up_gate_scales,
        weights.down,
        weights.down_scales,
        first_expert,
        2.5,
    )
    config = MoeConfig(n_routed_experts=model_experts, n_group=8, topk_group=4, num_experts_per_tok=8)
    ids, gates = route(logits, bias, config)
    local = torch.where((ids >= first_expert) & (ids < first_expert + 8), ids - first_expert, -1).to(torch.int32)
    assert (local >= 0).any()
    routed = replace(batch, expert_ids=local, weights=gates)
    assert relative_error(expected, reference_partials(routed, weights)) < 1e-5
