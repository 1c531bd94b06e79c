"""Which owner computes each expert: a pure function of what is known of the servers at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertd.client.fleet.member import Member

NOBODY = -1
ELSEWHERE = 4096
"""Tokens: so many more must be outstanding here before a server in another locality is asked."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One server."""

    number: int
    outstanding_tokens: int = 0
    in_use: bool = True
    busy: bool = False
    """It was full, and wants to be asked later."""
    elsewhere: bool = False
    """It is in another locality than the coordinator."""
    slow: bool = False
    """It takes far longer than others."""
    weight: float = 1.0
    """How many times as long as the fastest it takes."""
    turn: float = 0.0
    """0 to below 1: of servers with as much to do, the one with the least comes first."""


def candidates(members: Sequence[Member], locality: str, first: float, now: float) -> tuple[Candidate, ...]:
    """A snapshot of `members`; `first`, 0 to below 1, says where their turns begin."""
    return tuple(
        Candidate(
            number=member.number,
            outstanding_tokens=member.outstanding_tokens,
            in_use=member.in_use,
            busy=member.busy_until > now,
            elsewhere=bool(locality) and member.shard is not None and member.shard.locality != locality,
            slow=member.slow,
            weight=member.weight,
            turn=(row / len(members) + first) % 1.0,
        )
        for row, member in enumerate(members)
    )


def choose(owned: Tensor, candidates: Sequence[Candidate], avoid: int | None = None) -> Tensor:
    """[n_routed_experts] int64: number of the owner to ask for each expert; `NOBODY` where none is in use.

    `owned` is [candidates, n_routed_experts] bool. It is the owner with the least to do; one that is busy or slow,
    and the one with the number `avoid`, only in need.
    """

    def reluctance(row: int) -> tuple[int, float]:
        one = candidates[row]
        last_resort = one.busy + one.slow + (one.number == avoid)
        return last_resort, one.weight * (one.outstanding_tokens + 1) + ELSEWHERE * one.elsewhere + one.turn

    usable = sorted((row for row, one in enumerate(candidates) if one.in_use), key=reluctance)
    numbers = np.array([*(candidates[row].number for row in usable), NOBODY])
    # Nobody, who comes last, owns everything.
    owners = np.vstack([owned.numpy()[usable], np.ones(owned.shape[1], np.bool_)])
    return torch.from_numpy(numbers[owners.argmax(axis=0)])
