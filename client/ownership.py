"""Who owns what: the answers of all servers' `GetShard`, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.kernels.config import MoeConfig
from expertd.proto.codec import ShardInfo
from expertd.proto.errors import ModelMismatch, UnknownExpert


@dataclass(frozen=True, slots=True, eq=False)
class Ownership:
    """Owners of every expert of every layer of one model."""

    config: MoeConfig
    model_fingerprint: str
    owners: Mapping[int, Tensor]
    """Layer -> [n_routed_experts] int64: the server, by index, that computes each expert."""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.owners))

    def of_layer(self, layer: int) -> Tensor:
        if layer not in self.owners:
            raise UnknownExpert(f"layer {layer} is on no server; layers served: {list(self.layers)}")
        return self.owners[layer]


def resolve_ownership(servers: Sequence[str], shards: Sequence[ShardInfo]) -> Ownership:
    """Choose the owner of every expert: the first server that lists it. `servers` are their names, for errors.

    Raises `ModelMismatch` when the servers hold different models and `UnknownExpert` when an expert of a layer that
    any server has is on none.
    """
    first = shards[0]
    for name, shard in zip(servers, shards, strict=True):
        if shard.model_fingerprint != first.model_fingerprint:
            raise ModelMismatch(
                f"{name} holds model {shard.model_fingerprint!r}, but {servers[0]} holds {first.model_fingerprint!r}"
            )
    config = MoeConfig.from_hf(first.config)
    layers = sorted({layer for shard in shards for layer in shard.layers})
    owners = {layer: _owners_of(layer, config, shards) for layer in layers}
    return Ownership(config, first.model_fingerprint, owners)


def _owners_of(layer: int, config: MoeConfig, shards: Sequence[ShardInfo]) -> Tensor:
    owner = torch.full((config.n_routed_experts,), -1, dtype=torch.int64)
    for index, shard in reversed(list(enumerate(shards))):
        if layer in shard.layers:
            owner[list(shard.experts)] = index
    missing = (owner < 0).nonzero().squeeze(1).tolist()
    if missing:
        raise UnknownExpert(
            f"layer {layer}: no server owns {_name_experts(missing)}; start servers with these --experts"
        )
    return owner


def _name_experts(experts: list[int]) -> str:
    shown = ", ".join(map(str, experts[:8]))
    rest = len(experts) - 8
    return f"expert{'s' if len(experts) > 1 else ''} {shown}" + (f" and {rest} more" if rest > 0 else "")
