"""Which model a coordinator calls, where servers hold several: pure functions of what the servers told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expertd.client.fleet.ownership import check_complete, resolve_ownership
from expertd.proto.base.errors import ModelMismatch, UnknownExpert
from expertd.proto.codec import ShardInfo

Told = tuple[str, ShardInfo]
"""A server's address and what it told."""


@dataclass(frozen=True, slots=True)
class Called:
    """What calls use."""

    main: str
    """A fingerprint."""
    other: str | None = None
    """Of the next generation."""
    share: float = 0.0
    """Of calls, that use that."""

    @property
    def fingerprints(self) -> tuple[str, ...]:
        return (self.main,) if self.other is None else (self.main, self.other)


def of_model(servers: Iterable[Told], fingerprint: str) -> list[Told]:
    """Those that have these weights, with what they tell of them."""
    told = [(name, shard.of(fingerprint)) for name, shard in servers]
    return [(name, shard) for name, shard in told if shard is not None]


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
    """The fingerprint to call, of `servers`, at least one: the pinned one, the only one, or the only complete one; of
    generations of which one follows another the former.

    Raises `ModelMismatch` where there is no such one.
    """
    if pinned is not None:
        if not of_model(servers, pinned):
            held = "; ".join(f"{name} holds {shard.model_fingerprint!r}" for name, shard in servers[:4])
            raise ModelMismatch(f"model_fingerprint is {pinned!r}, which no server holds: {held}")
        return pinned
    fingerprints = _bases(servers)
    if len(fingerprints) == 1:
        return fingerprints[0]
    complete = [one for one in fingerprints if is_complete(of_model(servers, one))]
    following = {
        shard.next.model_fingerprint for _, shard in servers if shard.next and shard.model_fingerprint in complete
    }
    first = [one for one in complete if one not in following]
    if len(first) != 1:
        # It names two servers and their models.
        resolve_ownership(servers)
    return first[0]


def choose_generation(servers: Sequence[Told], main: str) -> Called:
    """What calls use of what `servers` tell that can be reached, where `main` was it, or the first generation was.

    A generation is used only when all its experts have owners. The next one is used as the least of the shares says
    that servers tell of it, so that nobody uses it who sees a server that has not been told yet; entirely at a share of
    1, and where the former one has no owners left.
    """
    following = [(shard.model_fingerprint, shard.next) for _, shard in servers if shard.next is not None]
    before = (base for base, one in following if one.model_fingerprint == main and _is_whole(servers, base))
    first = next(before, main)
    shares: dict[str, float] = {}
    for base, one in following:
        if base == first:
            shares[one.model_fingerprint] = min(one.share, shares.get(one.model_fingerprint, 1.0))
    whole = [name for name in shares if _is_whole(servers, name)]
    if whole:
        if shares[whole[0]] == 1.0 or not _is_whole(servers, first):
            return Called(whole[0])
        return Called(first, whole[0], shares[whole[0]]) if shares[whole[0]] else Called(first)
    if not of_model(servers, first):
        others = [name for name in _bases(servers) if _is_whole(servers, name)]
        return Called(others[0] if len(others) == 1 else first)
    return Called(first)


def _bases(servers: Sequence[Told]) -> list[str]:
    return list(dict.fromkeys(shard.model_fingerprint for _, shard in servers))


def _is_whole(servers: Sequence[Told], fingerprint: str) -> bool:
    try:
        return is_complete(of_model(servers, fingerprint))
    except ModelMismatch:
        return False
