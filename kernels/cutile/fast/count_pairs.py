"""How many (token, expert) pairs every run of tokens has for every local expert."""

from __future__ import annotations

from typing import Annotated

import cuda.tile as ct
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch, take_turn

ConstInt = Annotated[int, ct.ConstantAnnotation()]
TOKENS = 128
"""Tokens of a block, here and in `place_pairs`."""


@ct.kernel
def count_pairs_kernel(
    expert_ids: ct.Array, counts: ct.Array, TOP_K: ConstInt, EXPERTS: ConstInt, TOKENS: ConstInt
) -> None:
    take_turn()
    block = ct.bid(0)
    token = block * TOKENS + ct.arange(TOKENS, dtype=ct.int32).reshape((TOKENS, 1))
    expert = ct.arange(EXPERTS, dtype=ct.int32).reshape((1, EXPERTS))
    members = ct.zeros((TOKENS, EXPERTS), dtype=ct.int32)
    for choice in range(TOP_K):
        chosen = ct.gather(expert_ids, (token, choice), padding_value=-1)
        members = members + (chosen == expert).astype(ct.int32)
    ct.store(counts, (block, 0), ct.sum(members, axis=0, keepdims=True))


def count_pairs(expert_ids: Tensor, counts: Tensor) -> Launch:
    """Write to `counts[b, e]` how many of the tokens `TOKENS * b` to `TOKENS * (b + 1)` go to local expert e.

    `expert_ids` is [T, k] int32, `counts` [at least T / TOKENS, experts rounded up to a power of two] int32.
    """
    tokens, top_k = expert_ids.shape
    return Launch(count_pairs_kernel, (ct.cdiv(tokens, TOKENS),), (expert_ids, counts, top_k, counts.shape[1], TOKENS))
