"""Which tokens and expert ids go to which server, and whether what came back covers them: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertd.client.call.choice import NOBODY
from expertd.client.fleet.groups import name_experts
from expertd.kernels.numerics.quantize import dequantize_activations
from expertd.kernels.numerics.tokens import Addend, count_pairs, gather, split_by_owner, sum_into
from expertd.proto.base.errors import ServerFault, Unavailable
from expertd.proto.codec import ExecuteResult


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Some tokens of a batch, and what is wanted of experts for them."""

    tokens: Tensor
    """[n] int64: indices of the tokens in the batch, ascending."""
    expert_ids: Tensor
    """[n, k] int32: global ids, -1 for none."""
    weights: Tensor
    """[n, k] float32; 0 beside a -1."""

    def split(self, max_tokens: int) -> list[Self]:
        """Cut into parts of at most `max_tokens` tokens, as equal as they can be."""
        parts = -(-len(self.tokens) // max_tokens)
        if parts == 1:
            return [self]
        pieces = zip(
            torch.tensor_split(self.tokens, parts),
            torch.tensor_split(self.expert_ids, parts),
            torch.tensor_split(self.weights, parts),
            strict=True,
        )
        return [replace(self, tokens=tokens, expert_ids=ids, weights=weights) for tokens, ids, weights in pieces]

    def expected_receipt(self) -> dict[int, int]:
        """(token, expert) pairs by global expert id."""
        return count_pairs(self.expert_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch(Work):
    """The part of it that one server computes: what others do is -1 here."""

    server: int = field(kw_only=True)


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """Partial sums of some rows of a block of tokens."""

    rows: npt.NDArray[np.int64]
    """[n], ascending."""
    sums: Tensor
    """[n, H]."""
    scales: Tensor | None = None
    """[n, H/128] float32: of FP8 sums."""

    def added(self) -> Tensor:
        """[n, H] of a dtype that torch adds."""
        return self.sums if self.scales is None else dequantize_activations(self.sums, self.scales)


def plan_dispatch(expert_ids: Tensor, weights: Tensor, chosen: Tensor) -> list[Dispatch]:
    """Split [T, k] global ids and weights by server; ascending server, each (token, expert) pair in exactly one.

    `chosen` is [shares, n_routed_experts] int64: the server that is to compute each expert, or `NOBODY`, for as many
    shares of the tokens, one after another. Raises `Unavailable`,
    naming them, for experts that nobody computes now.
    """
    parts, orphans = split_by_owner(expert_ids, weights, chosen)
    if orphans:
        raise Unavailable(f"no server that can be reached owns {name_experts(sorted(set(orphans)))}")
    return [Dispatch(*part, server=server) for server, part in parts]


def leave_out(work: Work, chosen: Tensor) -> tuple[Work, Work]:
    """`work` without the experts that nobody computes, of any share, and those alone; `chosen` as for
    `plan_dispatch`."""
    wanted = work.expert_ids >= 0
    orphaned = (chosen[0, work.expert_ids.long()] == NOBODY) & wanted

    def only(pairs: Tensor) -> Work:
        return replace(
            work,
            expert_ids=work.expert_ids.masked_fill(~pairs, -1),
            weights=work.weights.masked_fill(~pairs, 0.0),
        )

    return only(wanted & ~orphaned), only(orphaned)


def renormalize(sums: Tensor, ids: Tensor, weights: Tensor, missing: Sequence[Work]) -> int:
    """Scale rows of `sums` [T, H] as if the weights of the experts that were computed added up to those of all.

    `ids` and `weights` [T, k] are the whole call's. A token that lost all its experts keeps zeros. The number of tokens
    that lost an expert.
    """
    lost = torch.zeros(len(ids), dtype=torch.float32, device="cpu")
    affected = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
    for part in missing:
        lost.index_add_(0, part.tokens, part.weights.sum(dim=1))
        affected[part.tokens[(part.expert_ids >= 0).any(dim=1)]] = True
    total = weights.masked_fill(ids < 0, 0.0).sum(dim=1)
    kept = total - lost
    factor = torch.where(affected & (kept > 0), total / kept, 1.0)
    sums *= factor.unsqueeze(1).to(sums.device)
    return int(affected.sum())


def check_receipt(work: Work, receipt: Mapping[int, int], server: str) -> None:
    """Raise `ServerFault`, naming the experts, unless `receipt` holds every pair of `work` exactly once."""
    expected = work.expected_receipt()
    if dict(receipt) == expected:
        return
    wrong = {
        expert: (expected.get(expert, 0), receipt.get(expert, 0))
        for expert in sorted(expected.keys() | receipt.keys())
        if expected.get(expert, 0) != receipt.get(expert, 0)
    }
    listed = ", ".join(f"expert {expert}: {sent} pairs sent, {done} computed" for expert, (sent, done) in wrong.items())
    raise ServerFault(f"{server}: the receipt does not match the request: {listed}")


def take_rows(values: Tensor, tokens: Tensor) -> Tensor:
    """`values[tokens]` for ascending tokens, without a copy where they are all in a row."""
    rows = _index(tokens.numpy())
    if isinstance(rows, slice):
        return values[rows]
    return values[tokens.to(values.device)] if values.is_cuda else gather(values, tokens)


def contributions(
    parts: Sequence[tuple[Dispatch, ExecuteResult]], num_tokens: int, block_tokens: int
) -> list[list[Contribution]]:
    """What `parts` give to each block of `block_tokens` tokens, in the order of `parts`."""
    blocks: list[list[Contribution]] = [[] for _ in range(0, num_tokens, block_tokens)]
    for dispatch, result in parts:
        tokens = dispatch.tokens.numpy()
        first, last = tokens[0] // block_tokens, tokens[-1] // block_tokens
        edges = np.searchsorted(tokens, np.arange(first, last + 2) * block_tokens)
        for block, (begin, end) in enumerate(pairwise(edges.tolist()), first):
            if begin < end:
                rows = tokens[begin:end] - block * block_tokens
                scales = None if result.scales is None else result.scales[begin:end]
                blocks[block].append(Contribution(rows, result.partials[begin:end], scales))
    return blocks


def combine(out: Tensor, contributions: Sequence[Contribution]) -> None:
    """Write the sums of all `contributions` to `out` [T, H], added in FP32 in their order: one order, one result."""
    first = contributions[0] if contributions else None
    if first is not None and len(contributions) == 1 and len(first.sums) == len(out) and first.scales is None:
        out.copy_(first.sums)
        return
    if not out.is_cuda:
        sum_into(out, [Addend(part.sums, torch.from_numpy(part.rows), scales=part.scales) for part in contributions])
        return
    total = torch.zeros(out.shape, device=out.device, dtype=torch.float32)
    for part in contributions:
        rows = _index(part.rows)
        if isinstance(rows, slice):
            total[rows].add_(part.added())
        else:
            total.index_add_(0, torch.from_numpy(rows).to(out.device), part.added().float())
    out.copy_(total)


def _index(tokens: npt.NDArray[np.int64]) -> slice | npt.NDArray[np.int64]:
    """Ascending row numbers, as a slice where there are no gaps."""
    first, last = int(tokens[0]), int(tokens[-1])
    return slice(first, last + 1) if last - first + 1 == len(tokens) else tokens
