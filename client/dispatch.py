"""Which tokens and expert ids go to which server, and whether what came back covers them: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertd.client.ownership import NOBODY, name_experts
from expertd.proto.codec import ExecuteResult
from expertd.proto.errors import ServerFault, Unavailable


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    """The part of a batch that one server computes."""

    server: int
    tokens: Tensor
    """[n] int64: indices of the tokens in the batch, ascending."""
    expert_ids: Tensor
    """[n, k] int32: global ids of this server's experts, -1 elsewhere."""
    weights: Tensor
    """[n, k] float32; 0 beside a -1."""

    def split(self, max_tokens: int) -> list[Dispatch]:
        """Cut into parts of at most `max_tokens` tokens, as equal as they can be."""
        parts = -(-len(self.tokens) // max_tokens)
        pieces = zip(
            torch.tensor_split(self.tokens, parts),
            torch.tensor_split(self.expert_ids, parts),
            torch.tensor_split(self.weights, parts),
            strict=True,
        )
        return [Dispatch(self.server, *piece) for piece in pieces]

    def expected_receipt(self) -> dict[int, int]:
        """(token, expert) pairs by global expert id."""
        experts, pairs = self.expert_ids[self.expert_ids >= 0].unique(return_counts=True)
        return dict(zip(experts.tolist(), pairs.tolist(), strict=True))


def plan_dispatch(expert_ids: Tensor, weights: Tensor, owner: Tensor) -> list[Dispatch]:
    """Split [T, k] global ids and weights by server; ascending server, each (token, expert) pair in exactly one.

    `owner` is [n_routed_experts] int64: the server that computes each expert, or `NOBODY`. Raises `Unavailable`, naming
    them, for experts that nobody computes now.
    """
    servers = owner[expert_ids.long()]
    orphans = expert_ids[(servers == NOBODY) & (expert_ids >= 0)]
    if len(orphans):
        raise Unavailable(f"no server that can be reached owns {name_experts(orphans.unique().tolist())}")
    servers.masked_fill_(expert_ids < 0, NOBODY)
    dispatches = []
    for server in servers[servers != NOBODY].unique().tolist():
        mine = servers == server
        tokens = mine.any(dim=1).nonzero().squeeze(1)
        chosen = mine[tokens]
        dispatches.append(
            Dispatch(
                server=server,
                tokens=tokens,
                expert_ids=expert_ids[tokens].masked_fill(~chosen, -1),
                weights=weights[tokens].masked_fill(~chosen, 0.0),
            )
        )
    return dispatches


def leave_out(work: Dispatch, owner: Tensor) -> tuple[Dispatch, Dispatch]:
    """`work` without the experts that nobody computes, and those alone; `owner` as for `plan_dispatch`."""
    wanted = work.expert_ids >= 0
    orphaned = (owner[work.expert_ids.long()] == NOBODY) & wanted

    def only(slots: Tensor) -> Dispatch:
        return replace(
            work,
            expert_ids=work.expert_ids.masked_fill(~slots, -1),
            weights=work.weights.masked_fill(~slots, 0.0),
        )

    return only(wanted & ~orphaned), only(orphaned)


def renormalize(sums: Tensor, ids: Tensor, weights: Tensor, missing: Sequence[Dispatch]) -> int:
    """Scale rows of `sums` [T, H] as if the weights of the experts that were computed added up to those of all.

    `ids` and `weights` [T, k] are the whole call's. A token that lost all its experts keeps zeros. The number of tokens
    that lost an expert.
    """
    lost = torch.zeros(len(ids))
    affected = torch.zeros(len(ids), dtype=torch.bool)
    for part in missing:
        lost.index_add_(0, part.tokens, part.weights.sum(dim=1))
        affected[part.tokens[(part.expert_ids >= 0).any(dim=1)]] = True
    total = weights.masked_fill(ids < 0, 0.0).sum(dim=1)
    kept = total - lost
    factor = torch.where(affected & (kept > 0), total / kept, 1.0)
    sums *= factor.unsqueeze(1)
    return int(affected.sum())


def check_receipt(dispatch: Dispatch, receipt: Mapping[int, int], server: str) -> None:
    """Raise `ServerFault`, naming the experts, unless `receipt` holds every pair of `dispatch` exactly once."""
    expected = dispatch.expected_receipt()
    if dict(receipt) == expected:
        return
    wrong = {
        expert: (expected.get(expert, 0), receipt.get(expert, 0))
        for expert in sorted(expected.keys() | receipt.keys())
        if expected.get(expert, 0) != receipt.get(expert, 0)
    }
    listed = ", ".join(f"expert {expert}: {sent} pairs sent, {done} computed" for expert, (sent, done) in wrong.items())
    raise ServerFault(f"{server}: the receipt does not match the request: {listed}")


def combine(num_tokens: int, width: int, parts: Sequence[tuple[Dispatch, ExecuteResult]]) -> Tensor:
    """Add partial sums into [T, H] float32, in the order of `parts`: one order, one result, bit for bit."""
    sums = torch.zeros(num_tokens, width)
    for dispatch, result in parts:
        sums.index_add_(0, dispatch.tokens, result.partials.float())
    return sums
