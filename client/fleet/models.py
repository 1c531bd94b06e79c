"""Which model a coordinator calls, where servers hold several: pure functions of what the servers told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expertd.client.fleet.ownership import check_complete, resolve_ownership
from expertd.proto.base.errors import ModelMismatch, UnknownExpert
from expertd.proto.codec import ShardInfo

Told = tuple[str, ShardInfo]
"""A server's address and what it told."""


def of_model(servers: Iterable[Told], fingerprint: str) -> list[Told]:
    return [one for one in servers if one[1].model_fingerprint == fingerprint]


def is_complete(servers: Sequence[Told]) -> bool:
    """Whether they, of one model, own every expert. Raises `ModelMismatch` for replicas that differ."""
    if not servers:
        return False
    try:
        check_complete(resolve_ownership(servers))
    except UnknownExpert:
        return False
    return True


def choose_model(servers: Sequence[Told], pinned: str | None) -> str:
    """The fingerprint to call, of `servers`, at least one: the pinned one, the only one, or the only complete one.

    Raises `ModelMismatch` where there is no such one.
    """
    fingerprints = list(dict.fromkeys(shard.model_fingerprint for _, shard in servers))
    if pinned is not None:
        if pinned not in fingerprints:
            held = "; ".join(f"{name} holds {shard.model_fingerprint!r}" for name, shard in servers[:4])
            raise ModelMismatch(f"model_fingerprint is {pinned!r}, which no server holds: {held}")
        return pinned
    if len(fingerprints) == 1:
        return fingerprints[0]
    complete = [one for one in fingerprints if is_complete(of_model(servers, one))]
    if len(complete) != 1:
        # It names two servers and their models.
        resolve_ownership(servers)
    return complete[0]
