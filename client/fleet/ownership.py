"""Who owns what: the answers of all servers' `GetShard`, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.kernels.model.config import MoeConfig
from expertd.proto.base.errors import ModelMismatch, UnknownExpert
from expertd.proto.codec import ShardInfo


@dataclass(frozen=True, slots=True, eq=False)
class Ownership:
    """The servers that own each expert of each layer of one model; several owners of an expert are replicas."""

    config: MoeConfig
    model_fingerprint: str
    owned: Mapping[int, Tensor]
    """Layer -> [servers, n_routed_experts] bool."""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.owned))

    def check_layer(self, layer: int) -> None:
        """Raise `UnknownExpert` for a layer that no server has."""
        if layer not in self.owned:
            raise UnknownExpert(f"layer {layer} is on no server; layers served: {list(self.layers)}")


def resolve_ownership(servers: Sequence[tuple[str, ShardInfo]]) -> Ownership:
    """What `servers`, at least one, own; their names are for errors.

    Raises `ModelMismatch` when the servers hold different models.
    """
    first_name, first = servers[0]
    for name, shard in servers:
        if shard.model_fingerprint != first.model_fingerprint:
            raise ModelMismatch(
                f"{name} holds model {shard.model_fingerprint!r}, but {first_name} holds {first.model_fingerprint!r}"
            )
    config = MoeConfig(**first.config)  # type: ignore[arg-type]
    layers = {layer for _, shard in servers for layer in shard.layers}
    owned = {layer: torch.zeros(len(servers), config.n_routed_experts, dtype=torch.bool) for layer in layers}
    for index, (_, shard) in enumerate(servers):
        for layer in shard.layers:
            owned[layer][index, list(shard.experts)] = True
    return Ownership(config, first.model_fingerprint, owned)


def check_complete(ownership: Ownership) -> None:
    """Raise `UnknownExpert`, naming the experts, unless every expert of every layer has an owner."""
    for layer in ownership.layers:
        missing = (~ownership.owned[layer].any(dim=0)).nonzero().squeeze(1).tolist()
        if missing:
            raise UnknownExpert(
                f"layer {layer}: no server owns {name_experts(missing)}; start servers with these --experts"
            )


def name_experts(experts: Sequence[int]) -> str:
    """ "expert 7", "experts 7, 8" or "experts 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"."""
    shown = ", ".join(map(str, experts[:8]))
    rest = len(experts) - 8
    return f"expert{'s' if len(experts) > 1 else ''} {shown}" + (f" and {rest} more" if rest > 0 else "")
