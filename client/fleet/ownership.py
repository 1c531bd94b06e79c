"""Who owns what: the answers of all servers' `GetShard`, checked against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertd.kernels.model.config import MoeConfig
from expertd.proto.base.errors import ModelMismatch, UnknownExpert
from expertd.proto.codec import DIGEST_BYTES, ShardInfo


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

    Raises `ModelMismatch` when the servers hold different models, or replicas of an expert different weights.
    """
    first_name, first = servers[0]
    for name, shard in servers:
        if shard.model_fingerprint != first.model_fingerprint:
            raise ModelMismatch(
                f"{name} holds model {shard.model_fingerprint!r}, but {first_name} holds {first.model_fingerprint!r}"
                + _advice(name, shard, first_name, first)
            )
    config = MoeConfig(**first.config)  # type: ignore[arg-type]
    check_replicas(servers, config)
    layers = {layer for _, shard in servers for layer in shard.layers}
    owned = {layer: torch.zeros(len(servers), config.n_routed_experts, dtype=torch.bool) for layer in layers}
    for index, (_, shard) in enumerate(servers):
        for layer in shard.layers:
            owned[layer][index, list(shard.experts)] = True
    return Ownership(config, first.model_fingerprint, owned)


def check_replicas(servers: Sequence[tuple[str, ShardInfo]], config: MoeConfig) -> None:
    """Raise `ModelMismatch`, naming servers, layer and expert, unless all owners of each expert say the same of it.

    What a server does not tell is not compared.
    """
    words = DIGEST_BYTES // 8
    depth = 1 + max(layer for _, shard in servers for layer in shard.layers)
    known = np.zeros((depth, config.n_routed_experts, words), dtype=np.uint64)
    owner = np.full(known.shape[:2], -1)
    for index, (name, shard) in enumerate(servers):
        if not shard.expert_digests:
            continue
        shape = (len(shard.layers), len(shard.experts), words)
        if len(shard.expert_digests) != 8 * math.prod(shape):
            raise ModelMismatch(f"{name} tells {len(shard.expert_digests)} bytes of digests for {shape[:2]} experts")
        told = np.frombuffer(shard.expert_digests, dtype=np.uint64).reshape(shape)
        place = np.ix_(shard.layers, shard.experts)
        other = (owner[place] >= 0) & (known[place] != told).any(axis=2)
        if other.any():
            row, column = np.argwhere(other)[0].tolist()
            layer, expert = shard.layers[row], shard.experts[column]
            raise ModelMismatch(
                f"{name} and {servers[owner[layer, expert]][0]} hold different weights of layer {layer}, expert"
                f" {expert}: digests {_hex(told[row, column])} and {_hex(known[layer, expert])};"
                f" they differ in {other.sum()} of the {other.size} experts of {name}."
                " One of the two checkpoints is damaged or another fine-tune: compare both with one manifest, by"
                " 'expertd fingerprint FOLDER --check MANIFEST'"
            )
        known[place], owner[place] = told, index


def _hex(digest: npt.NDArray[np.uint64]) -> str:
    return digest.tobytes().hex()


def _advice(name: str, shard: ShardInfo, first_name: str, first: ShardInfo) -> str:
    if shard.has_manifest == first.has_manifest:
        return ""
    with_one, without = (name, first_name) if shard.has_manifest else (first_name, name)
    return f"; {with_one} was started with a manifest and {without} without: give all servers the same one, or none"


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
