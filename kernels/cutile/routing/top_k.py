"""Routing in one launch: scores of any family, bias, groups, top-k, normalisation and scaling."""

from __future__ import annotations

import math
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
def route_kernel(
    logits: ct.Array,
    bias: ct.Array,
    ids: ct.Array,
    weights: ct.Array,
    GROUPS: ConstInt,
    KEPT: ConstInt,
    SIZE: ConstInt,
    TOP: ConstInt,
    PAD_GROUPS: ConstInt,
    PAD_SIZE: ConstInt,
    PAD_TOP: ConstInt,
    SCORING: ConstInt,
    NORMALIZE: ConstBool,
    SCALE: ConstFloat,
) -> None:
    token = ct.bid(0)
    group = ct.arange(PAD_GROUPS, dtype=ct.int32).reshape((PAD_GROUPS, 1))
    member = ct.arange(PAD_SIZE, dtype=ct.int32).reshape((1, PAD_SIZE))
    expert = group * SIZE + member
    exists = (group < GROUPS) & (member < SIZE)
    scores = scores_of(ct.gather(logits, (token, expert), mask=exists), exists, SCORING)
    choice = ct.where(exists, scores + ct.gather(bias, expert, mask=exists), -math.inf)

    eligible = choice
    if KEPT < GROUPS:
        group_scores = ct.max(choice, axis=1, keepdims=True)
        if SIZE > 1:
            first = ct.argmax(choice, axis=1, keepdims=True)
            group_scores = group_scores + ct.max(ct.where(member == first, -math.inf, choice), axis=1, keepdims=True)
        eligible = ct.full((PAD_GROUPS, PAD_SIZE), -math.inf, dtype=ct.float32)
        for _ in range(KEPT):
            best = ct.argmax(group_scores, axis=0, keepdims=True)
            eligible = ct.where(group == best, choice, eligible)
            group_scores = ct.where(group == best, -math.inf, group_scores)

    # Ties go to the lower expert id because argmax takes the lowest index, and groups are in the order of the ids.
    flat_eligible = eligible.reshape((1, PAD_GROUPS * PAD_SIZE))
    flat_scores = scores.reshape((1, PAD_GROUPS * PAD_SIZE))
    flat_expert = ct.where(exists, expert, 0).reshape((1, PAD_GROUPS * PAD_SIZE))
    index = ct.arange(PAD_GROUPS * PAD_SIZE, dtype=ct.int32).reshape((1, PAD_GROUPS * PAD_SIZE))
    rank = ct.arange(PAD_TOP, dtype=ct.int32).reshape((1, PAD_TOP))
    chosen = ct.zeros((1, PAD_TOP), dtype=ct.int32)
    gates = ct.zeros((1, PAD_TOP), dtype=ct.float32)
    for k in range(TOP):
        best = ct.argmax(flat_eligible, axis=1, keepdims=True)
        here = index == best
        chosen = ct.where(rank == k, ct.sum(ct.where(here, flat_expert, 0), axis=1, keepdims=True), chosen)
        gates = ct.where(rank == k, ct.sum(ct.where(here, flat_scores, 0.0), axis=1, keepdims=True), gates)
        flat_eligible = ct.where(here, -math.inf, flat_eligible)
    ct.store(ids, (token, 0), chosen)
    ct.store(weights, (token, 0), weights_of(gates, NORMALIZE, SCALE))


def route(logits: Tensor, correction_bias: Tensor, ids: Tensor, weights: Tensor, config: MoeConfig) -> Launch:
    """Route [T, E] float32 `logits` with the [E] float32 bias; write [T, k] int32 `ids` and float32 `weights`.

    The choices are those of `expertd.kernels.numerics.routing.route` on the same device: descending by score, ties
    toward the lower id. Scores that differ by an ulp may tie here and not there.
    """
    sizes = (config.n_group, config.topk_group, config.experts_per_group, config.num_experts_per_tok)
    padded = map(power_of_2, (config.n_group, config.experts_per_group, config.num_experts_per_tok))
    scaling = (config.norm_topk_prob, float(config.routed_scaling_factor))
    args = (logits, correction_bias, ids, weights, *sizes, *padded, SCORINGS[config.family.scoring_func], *scaling)
    return Launch(route_kernel, (len(logits),), args)
