"""What a fleet looks like from outside: who serves what, what is missing, and what does not belong together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from expertd.client.fleet.groups import Holding, faults
from expertd.client.fleet.ownership import resolve_ownership
from expertd.client.fleet.ports import explained
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.health import ask_health
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.model.config import MoeConfig
from expertd.proto.base.errors import ExpertdError, ModelMismatch
from expertd.proto.codec import ShardInfo


@dataclass(frozen=True, slots=True)
class Seen:
    """One server; None of what it did not tell."""

    address: str
    health: str
    """By its name in the health protocol, or why there is none."""
    shard: ShardInfo | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """A fleet of one model is whole without problems; notes are what its keeper may want to know."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    replicas: tuple[int, int] | None
    """Fewest and most owners of an expert."""


async def survey(addresses: Sequence[str], security: ClientSecurity, timeout: float) -> list[Seen]:
    """Ask all servers at once, each for its health and its shard."""
    return list(await asyncio.gather(*(_look(address, security, timeout) for address in addresses)))


async def _look(address: str, security: ClientSecurity, timeout: float) -> Seen:
    health = await ask_health(address, security, timeout)
    transport = GrpcTransport(address, security=security)
    try:
        return Seen(address, health, await transport.get_shard(timeout))
    except ExpertdError as error:
        # Health has the reason where nobody is there at all.
        return Seen(address, explained(health if health != "SERVING" else error, security), None)
    finally:
        await transport.close()


def judge(seen: Sequence[Seen]) -> Judgement:
    """What is wrong with the fleet and what is mixed in it."""
    problems = [f"{one.address} does not serve: {one.health}" for one in seen if one.health != "SERVING"]
    problems += [
        f"{one.address} did not tell what it owns" for one in seen if one.health == "SERVING" and not one.shard
    ]
    told = [(one.address, one.shard) for one in seen if one.shard is not None]
    notes = [
        f"mixed {what}: " + "; ".join(f"{value!r} on {', '.join(where)}" for value, where in groups.items())
        for what, field in (("versions", "version"), ("backends", "backend"), ("weights", "weights"))
        if len(groups := _group(told, field)) > 1
    ]
    notes += _next_generations(told)
    wrong, states = faults([_holding(address, shard) for address, shard in told])
    problems += wrong
    notes += states
    if states or not told:
        return Judgement(tuple(problems), tuple(notes), None)
    try:
        owned = resolve_ownership(told).owned
    except ModelMismatch as error:
        return Judgement((*problems, str(error)), tuple(notes), None)
    every = torch.stack([rows.sum(dim=0) for rows in owned.values()])
    return Judgement(tuple(problems), tuple(notes), (int(every.min()), int(every.max())))


def _holding(address: str, shard: ShardInfo) -> Holding:
    routed = MoeConfig(**shard.config).n_routed_experts  # type: ignore[arg-type]
    return Holding(address, shard.model_fingerprint, shard.experts, routed)


def _next_generations(told: Sequence[tuple[str, ShardInfo]]) -> list[str]:
    """A line for each that is there beside the one that serves, and for each share of calls."""
    groups = _group([one for one in told if one[1].next], "next.model_fingerprint", "next.share")
    return [
        f"next weights {fingerprint!r} for {share:.0%} of calls on {', '.join(where)}"
        for (fingerprint, share), where in groups.items()
    ]


def _group(told: Sequence[tuple[str, ShardInfo]], *fields: str) -> dict[Any, list[str]]:
    """Addresses by what they say of a field, or of several."""
    groups: dict[Any, list[str]] = {}
    for address, shard in told:
        groups.setdefault(attrgetter(*fields)(shard), []).append(address)
    return groups
