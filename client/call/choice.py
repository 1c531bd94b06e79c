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

    def drawn(self, draws: tuple[float, float], costs: Floats) -> Integers:
        """[experts]: of two drawn owners the one with the lower of `costs`, or else the first."""
        first = (draws[0] * self.counts).astype(np.int64)
        second = (first + 1 + (draws[1] * (self.counts - 1)).astype(np.int64)) % self.counts
        experts = np.arange(len(self.counts))
        return _cheaper(costs, self.rows[first, experts], self.rows[second, experts])


class Owners:
    """Who owns the experts of one layer."""

    def __init__(self, owned: Tensor) -> None:
        """`owned` is [servers, n_routed_experts] bool."""
        self.owned = owned
        self._copies: dict[tuple[int, ...], Copies] = {}

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
    owners: Owners, candidates: Sequence[Candidate], draws: tuple[float, float], avoid: int | None = None
) -> Tensor:
    """[n_routed_experts] int64: number of the owner to ask for each expert; `NOBODY` where none is in use.

    `candidates` are the servers that `owners` knows. Two owners of an expert are drawn, by `draws` from [0, 1), and the
    one with less to do is asked, or else the first: who took the one with the least of all would meet all others there
    who saw the same. Experts with the same owners go to the same one. One that is busy or slow, and the one with the
    number `avoid`, is asked only in need.
    """
    nobody = len(candidates)
    costs = np.array([*(one.cost for one in candidates), np.inf])
    tiers: dict[int, dict[bool, tuple[int, ...]]] = {}
    for row, one in enumerate(candidates):
        if one.in_use:
            tier = tiers.setdefault(one.busy + one.slow + (one.number == avoid), {})
            tier[one.elsewhere] = (*tier.get(one.elsewhere, ()), row)
    chosen = np.full(owners.owned.shape[1], nobody)
    for reasons in sorted(tiers):
        drawn = [owners.among(rows).drawn(draws, costs) for rows in tiers[reasons].values()]
        found = drawn[0] if len(drawn) == 1 else _cheaper(costs, *drawn)
        chosen = np.where(chosen == nobody, found, chosen)
    return torch.from_numpy(np.array([*(one.number for one in candidates), NOBODY])[chosen])


def _cheaper(costs: Floats, first: Integers, second: Integers) -> Integers:
    return np.where(costs[second] < costs[first], second, first)
