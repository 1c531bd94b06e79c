"""Which tokens and expert ids go to which server, and whether what came back covers them: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
