"""Which owner computes each expert: a pure function of what is known of the servers at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertd.client.fleet.member import Member

NOBODY = -1
ELSEWHERE = 4096
"""Tokens: so many more must be outstanding here before a server in another locality is asked."""
SHARE_TOKENS = 4096
"""Of a batch, for each share that the mean expert's tokens are cut into: 128 for it where a token has 8 of 256, which
an H200 computes as long as it reads the expert's weights, as each copy that is asked must."""
MOST_KNOWN = 64
"""Sets of servers of which it is kept who owns what."""
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One server."""

    number: int
    outstanding_tokens: float = 0
    in_use: bool = True
    busy: bool = False
    """It was full, and wants to be asked later."""
    elsewhere: bool = False
    """It is in another locality than the coordinator."""
    slow: bool = False
    """It takes far longer than others."""
    weight: float = 1.0
    """How many times as long as the fastest it takes."""

    @property
    def cost(self) -> float:
        """What it has to do, in tokens, as if it were near and fast."""
        return self.weight * (self.outstanding_tokens + 1) + ELSEWHERE * self.elsewhere


def candidates(members: Sequence[Member], locality: str, now: float) -> tuple[Candidate, ...]:
    """A snapshot of `members`."""
    return tuple(
        Candidate(
            number=member.number,
            outstanding_tokens=member.outstanding_tokens,
            in_use=member.in_use,
            busy=member.busy_until > now,
            elsewhere=bool(locality) and member.shard is not None and member.shard.locality != locality,
            slow=member.slow,
            weight=member.weight,
        )
        for member in members
    )


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Of each expert the owners among some servers."""

    rows: Integers
    """[copies, experts]: who owns an expert, ascending; the number of all servers where there are no further ones."""
    counts: Integers
    """[experts], at least 1: also where the one is nobody."""

    def drawn(self, starts: Floats, other: float, costs: Floats, slack: float) -> Integers:
        """[shares, experts]: of two drawn owners the first, or the second where it costs less by more than `slack`.

        `starts` [shares, 1] say which is the first, and `other` which of the others is the second.
        """
        first = (starts * self.counts).astype(np.int64)
        second = (first + 1 + (other * (self.counts - 1)).astype(np.int64)) % self.counts
        experts = np.arange(len(self.counts))
        return _cheaper(costs, self.rows[first, experts], self.rows[second, experts], slack)


class Owners:
    """Who owns the experts of one layer."""

    def __init__(self, owned: Tensor) -> None:
        """`owned` is [servers, n_routed_experts] bool."""
        self.owned = owned
        copies = owned.sum(dim=0).float()
        self._most, self._mean = int(copies.max()), float(copies.mean())
        self._copies: dict[tuple[int, ...], Copies] = {}

    def count_shares(self, tokens: int) -> int:
        """Into how many a batch of `tokens` is cut: at most as many as there are copies of any expert.

        Copies are given by heat, so that the expert with most of them has that many times the mean one's tokens.
        """
        wanted = tokens * self._most / (SHARE_TOKENS * self._mean) if self._mean else 0.0
        return max(1, min(self._most, int(wanted)))

    def among(self, rows: tuple[int, ...]) -> Copies:
        """The owners among `rows`, ascending."""
        known = self._copies.get(rows)
        if known is None:
            # Of those in use, those that are slow, and so on: few at a time, but not for ever.
            self._copies = {} if len(self._copies) == MOST_KNOWN else self._copies.copy()
            known = self._copies[rows] = self._find(rows)
        return known

    def _find(self, rows: tuple[int, ...]) -> Copies:
        held = self.owned.numpy()[list(rows)]
        owners = np.sort(np.where(held, np.array(rows)[:, None], len(self.owned)), axis=0)
        counts = np.maximum(held.sum(axis=0), 1)
        return Copies(owners[: counts.max()], counts)


def choose(
    owners: Owners, candidates: Sequence[Candidate], draws: tuple[float, float], tokens: int, avoid: int | None = None
) -> Tensor:
    """[shares, n_routed_experts] int64: number of the owner to ask for each expert, `NOBODY` where none is in use, for
    each of the shares of a batch of `tokens`, one after another; where one is to `avoid`, for all of it as one.

    `candidates` are the servers that `owners` knows. Two owners of an expert are drawn, by `draws` from [0, 1), and the
    first is asked, or the second where that has less to do: who took the one with the least of all would meet all
    others there who saw the same. Experts with the same owners go to the same one. Of shares each copy of an expert
    gets as many, unless one has more to do than another by more than a share. One that is busy or slow, and the one
    with the number `avoid`, is asked only in need.
    """
    shares = 1 if avoid is not None else owners.count_shares(tokens)
    starts = (draws[0] + np.arange(shares)[:, None] / shares) % 1.0
    slack = tokens / shares if shares > 1 else 0.0
    nobody = len(candidates)
    costs = np.array([*(one.cost for one in candidates), np.inf])
    chosen = np.full((shares, owners.owned.shape[1]), nobody)
    for tier in _tiers(candidates, avoid):
        drawn = [owners.among(rows).drawn(starts, draws[1], costs, slack) for rows in tier]
        found = drawn[0] if len(drawn) == 1 else _cheaper(costs, drawn[0], drawn[1])
        chosen = np.where(chosen == nobody, found, chosen)
    return torch.from_numpy(np.array([*(one.number for one in candidates), NOBODY])[chosen])


def _tiers(candidates: Sequence[Candidate], avoid: int | None) -> list[list[tuple[int, ...]]]:
    """Rows of those in use, by how much speaks against asking them, and those who are near and elsewhere apart."""
    tiers: dict[int, dict[bool, tuple[int, ...]]] = {}
    for row, one in enumerate(candidates):
        if one.in_use:
            tier = tiers.setdefault(one.busy + one.slow + (one.number == avoid), {})
            tier[one.elsewhere] = (*tier.get(one.elsewhere, ()), row)
    return [list(tiers[reasons].values()) for reasons in sorted(tiers)]


def _cheaper(costs: Floats, first: Integers, second: Integers, slack: float = 0.0) -> Integers:
    return np.where(costs[second] + slack < costs[first], second, first)
