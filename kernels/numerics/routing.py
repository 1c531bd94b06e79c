"""Routing: which experts a token goes to, and with which weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import softplus

from expertd.kernels.model.config import MoeConfig

_SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": partial(torch.softmax, dim=-1),
    # DeepSeek-V4's (transformers' SqrtSoftplusActivation).
    "sqrtsoftplus": lambda logits: softplus(logits).sqrt(),
}


def router_logits(hidden: Tensor, gate_weight: Tensor) -> Tensor:
    """[T, H] hidden states and the gate's [E, H] weight, any float dtype -> [T, E] float32 logits."""
    return torch.nn.functional.linear(hidden.float(), gate_weight.float())


def route(logits: Tensor, correction_bias: Tensor, config: MoeConfig) -> tuple[Tensor, Tensor]:
    """Choose experts by group-limited top-k (DeepSeek-V3 report, section 2.1.2 with node-limited routing).

    With softmax scores, one group and no bias it is the plain top-k of Qwen3-MoE and Mixtral.

    `logits` is [T, E] float32, `correction_bias` [E] float32, over all E experts of the model. Returns global expert
    ids [T, k] int32 in descending order of choice score, ties toward the lower id, and their weights [T, k] float32.
    """
    scores = _SCORES[config.family.scoring_func](logits.float())
    choice = scores + correction_bias.float()
    grouped = choice.unflatten(-1, (config.n_group, config.experts_per_group))
    group_scores = grouped.topk(min(2, config.experts_per_group), dim=-1).values.sum(dim=-1)
    kept = _top(group_scores, config.topk_group)
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    eligible = grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(1)
    ids = _top(eligible, config.num_experts_per_tok)
    return ids.to(torch.int32), _weights(scores, ids, config)


def weigh(logits: Tensor, expert_ids: Tensor, config: MoeConfig) -> Tensor:
    """The weights [T, k] float32 of experts that were chosen otherwise, as by token id in DeepSeek-V4's first layers
    (transformers' DeepseekV4HashRouter).

    `logits` is [T, E] float32, `expert_ids` [T, k] of any integer dtype.
    """
    return _weights(_SCORES[config.family.scoring_func](logits.float()), expert_ids.long(), config)


def first_repeat(expert_ids: npt.NDArray[np.integer[Any]]) -> int | None:
    """The first row of [T, k] expert ids (-1 for none) that names an expert more than once."""
    if len(expert_ids) == 1:
        # For so few numbers NumPy takes 17 us among other work, this takes 3.
        named = [expert for expert in expert_ids[0].tolist() if expert >= 0]
        return None if len(set(named)) == len(named) else 0
    ordered = np.sort(expert_ids, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    return int(repeated.any(axis=1).argmax()) if np.logical_or.reduce(repeated, axis=None) else None


def _weights(scores: Tensor, ids: Tensor, config: MoeConfig) -> Tensor:
    weights = scores.gather(1, ids)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * config.routed_scaling_factor


def _top(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest along the last axis; `topk` leaves the order of equal values open."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
