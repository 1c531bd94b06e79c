"""The weights that a server answers with: those that serve and, beside them, the next ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from expertd._native import Placement
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import ExpertMatrices, read_expert
from expertd.kernels.weights.ledger import Ledger
from expertd.server.scheduling.shard import Parts, Shard


@dataclass(frozen=True, eq=False)
class Generation:
    """The weights of a shard, with where they are from."""

    shard: Shard
    checkpoint: Checkpoint
    ledger: Ledger
    stored: tuple[torch.dtype, ...] = ()
    """What the checkpoint's files hold them as, once that is known."""
    num_bytes: int = 0
    """That were read for them beside others that serve."""

    @property
    def fingerprint(self) -> str:
        return self.shard.model_fingerprint

    @property
    def keys(self) -> set[int]:
        """What the backend knows its layers by."""
        return {self.shard.key(layer) for layer in self.shard.layers}


@dataclass(frozen=True, eq=False)
class Generations:
    """Of the same experts."""

    serving: Generation
    next: Generation | None = None
    share: float = 0.0
    """Of calls, that should use the next one."""

    @property
    def all(self) -> tuple[Generation, ...]:
        return (self.serving,) if self.next is None else (self.serving, self.next)

    @property
    def keys(self) -> set[int]:
        return set().union(*(one.keys for one in self.all))

    @property
    def checkpoints(self) -> set[Checkpoint]:
        return {one.checkpoint for one in self.all}

    def only(self, computable: Callable[[int], set[int]]) -> Generations:
        """The same without experts that are not `computable`, those of a layer by its key."""
        now = [replace(one, shard=one.shard.only(computable)) for one in self.all]
        return Generations(now[0], now[1] if len(now) > 1 else None, self.share)

    def named(self, fingerprint: str) -> Generation | None:
        return next((one for one in self.all if one.fingerprint == fingerprint), None)

    def at(self, epoch: int) -> Generations:
        """The same under another epoch."""
        now = [replace(one, shard=replace(one.shard, placement_epoch=epoch)) for one in self.all]
        return Generations(now[0], now[1] if len(now) > 1 else None, self.share)

    def placement(self, max_tokens: int, parts: Parts) -> Placement:
        """See `Shard.placement`."""
        beside = None if self.next is None else self.next.shard.placement(max_tokens, parts)
        return self.serving.shard.placement(max_tokens, parts, beside)

    def read(self, fingerprint: str, layer: int, expert: int) -> ExpertMatrices | None:
        """An expert of the generation with this fingerprint, from its files; None where it is not among these.

        Raises `CheckpointError`.
        """
        generation = self.named(fingerprint)
        if generation is None:
            return None
        return read_expert(generation.checkpoint, layer, expert, generation.shard.weight_dtype)
