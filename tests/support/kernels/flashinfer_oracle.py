"""FlashInfer-bench's definition `moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048`, from its formula.

Routing and experts in one: of E experts in 8 groups, each token takes the 8 best of its 4 best groups, and the E_local
experts from `local_expert_offset` on are computed here. Sizes come from the tensors, so that small ones run on a CPU.
"""

import torch
from torch import Tensor

TOP_K = 8
GROUPS = 8
KEPT_GROUPS = 4
BLOCK = 128


def moe_fp8_block_scale_ds_routing(
    routing_logits: Tensor,
    routing_bias: Tensor,
    hidden_states: Tensor,
    hidden_states_scale: Tensor,
    gemm1_weights: Tensor,
    gemm1_weights_scale: Tensor,
    gemm2_weights: Tensor,
    gemm2_weights_scale: Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
) -> Tensor:
    """Expert outputs [T, H] float32.

    `routing_logits` [T, E] float32, `routing_bias` [E] bfloat16 or float32, `hidden_states` [T, H] FP8 with
    `hidden_states_scale` [H/128, T], `gemm1_weights` [E_local, 2I, H] FP8 (first I rows the linear part, last I rows
    the gated part) with scales [E_local, 2I/128, H/128], `gemm2_weights` [E_local, H, I] FP8 with scales.
    """
    hidden = hidden_states.float() * hidden_states_scale.T.repeat_interleave(BLOCK, dim=1)
    weights, chosen = _route(routing_logits, routing_bias, routed_scaling_factor)
    output = torch.zeros_like(hidden)
    for local in range(len(gemm1_weights)):
        expert = local_expert_offset + local
        tokens = chosen[:, expert].nonzero().squeeze(1)
        if not len(tokens):
            continue
        first = hidden[tokens] @ _dequantize(gemm1_weights[local], gemm1_weights_scale[local]).T
        linear, gated = first.chunk(2, dim=1)
        activated = gated / (1 + torch.exp(-gated)) * linear
        second = activated @ _dequantize(gemm2_weights[local], gemm2_weights_scale[local]).T
        output.index_add_(0, tokens, second * weights[tokens, expert, None])
    return output


def _route(logits: Tensor, bias: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Weights [T, E] float32 and the mask [T, E] of the chosen experts."""
    tokens, experts = logits.shape
    scores = 1 / (1 + torch.exp(-logits.float()))
    biased = scores + bias.float()
    in_groups = biased.view(tokens, GROUPS, experts // GROUPS)
    group_scores = in_groups.topk(2, dim=2).values.sum(dim=2)
    group_mask = torch.zeros_like(group_scores).scatter_(1, group_scores.topk(KEPT_GROUPS, dim=1).indices, 1.0)
    allowed = group_mask.repeat_interleave(experts // GROUPS, dim=1).bool()
    best = biased.masked_fill(~allowed, torch.finfo(torch.float32).min).topk(TOP_K, dim=1).indices
    chosen = torch.zeros_like(allowed).scatter_(1, best, True)
    kept = scores * chosen
    return kept / (kept.sum(dim=1, keepdim=True) + 1e-20) * scaling, chosen


def _dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.float() * scale.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
