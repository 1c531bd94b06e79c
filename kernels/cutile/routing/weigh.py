"""The weights of experts that were chosen otherwise, as by token id in DeepSeek-V4's first layers, in one launch."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch
from expertd.kernels.cutile.routing.scores import SCORINGS, power_of_2, scores_of, weights_of
from expertd.kernels.model.config import MoeConfig

ConstInt = Annotated[int, ct.ConstantAnnotation()]
ConstBool = Annotated[bool, ct.ConstantAnnotation()]
ConstFloat = Annotated[float, ct.ConstantAnnotation()]


@ct.kernel(occupancy=8)
def weigh_kernel(
    logits: ct.Array,
    ids: ct.Array,
    weights: ct.Array,
    EXPERTS: ConstInt,
    TOP: ConstInt,
    PAD_EXPERTS: ConstInt,
    PAD_TOP: ConstInt,
    SCORING: ConstInt,
    NORMALIZE: ConstBool,
    SCALE: ConstFloat,
) -> None:
    token = ct.bid(0)
    expert = ct.arange(PAD_EXPERTS, dtype=ct.int32).reshape((1, PAD_EXPERTS))
    exists = expert < EXPERTS
    scores = scores_of(ct.gather(logits, (token, expert), mask=exists), exists, SCORING)
    rank = ct.arange(PAD_TOP, dtype=ct.int32).reshape((1, PAD_TOP))
    chosen = ct.zeros((1, PAD_TOP), dtype=ct.float32)
    for k in range(TOP):
        here = exists & (expert == ct.load(ids, (token, k), (1, 1)))
        chosen = ct.where(rank == k, ct.sum(ct.where(here, scores, 0.0), axis=1, keepdims=True), chosen)
    ct.store(weights, (token, 0), weights_of(chosen, NORMALIZE, SCALE))


def weigh(logits: Tensor, expert_ids: Tensor, weights: Tensor, config: MoeConfig) -> Launch:
    """Write the `weights` [T, k] float32 of `expert_ids` [T, k] int32, of [T, E] float32 `logits`.

    They are those of `expertd.kernels.numerics.routing.weigh`; an id that is no expert of the model weighs nothing.
    """
    sizes = (config.n_routed_experts, config.num_experts_per_tok)
    scaling = (config.norm_topk_prob, float(config.routed_scaling_factor))
    scoring = SCORINGS[config.family.scoring_func]
    args = (logits, expert_ids, weights, *sizes, *map(power_of_2, sizes), scoring, *scaling)
    return Launch(weigh_kernel, (len(logits),), args)
