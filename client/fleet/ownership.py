"""Who owns what: the answers of all servers' `GetShard`, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertd.client.fleet.groups import name_experts
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
    replicated: frozenset[int]
    """Layers with an expert that has several owners."""

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
    owned = {
        layer: torch.zeros(len(servers), config.n_routed_experts, dtype=torch.bool, device="cpu") for layer in layers
    }
    for index, (_, shard) in enumerate(servers):
        for layer in shard.layers:
            owned[layer][index, list(shard.experts[layer])] = True
    replicated = frozenset(layer for layer, rows in owned.items() if (rows.sum(dim=0) > 1).any())
    return Ownership(config, first.model_fingerprint, owned, replicated)


def check_replicas(servers: Sequence[tuple[str, ShardInfo]], config: MoeConfig) -> None:
    """Raise `ModelMismatch`, naming servers, layer and expert, unless all owners of each expert say the same of it.

    What a server does not tell is not compared.
    """
    words = DIGEST_BYTES // 8
    depth = 1 + max((layer for _, shard in servers for layer in shard.layers), default=0)
    known = np.zeros((depth, config.n_routed_experts, words), dtype=np.uint64)
    _check_dtypes(servers, (depth, config.n_routed_experts))
    owner = np.full(known.shape[:2], -1)
    for index, (name, shard) in enumerate(servers):
        if not shard.expert_digests:
            continue
        place = _places(shard)
        count = len(place[0])
        if len(shard.expert_digests) != DIGEST_BYTES * count:
            raise ModelMismatch(f"{name} tells {len(shard.expert_digests)} bytes of digests for {count} experts")
        told = np.frombuffer(shard.expert_digests, dtype=np.uint64).reshape(count, words)
        other = (owner[place] >= 0) & (known[place] != told).any(axis=1)
        if other.any():
            at = int(other.argmax())
            layer, expert = int(place[0][at]), int(place[1][at])
            raise ModelMismatch(
                f"{name} and {servers[owner[layer, expert]][0]} hold different weights of layer {layer}, expert"
                f" {expert}: digests {_hex(told[at])} and {_hex(known[layer, expert])};"
                f" they differ in {other.sum()} of the {other.size} experts of {name}."
                " One of the two checkpoints is damaged or another fine-tune: compare both with one manifest, by"
                " 'expertd fingerprint FOLDER --check MANIFEST'"
            )
        known[place], owner[place] = told, index


def _check_dtypes(servers: Sequence[tuple[str, ShardInfo]], shape: tuple[int, int]) -> None:
    """Raise `ModelMismatch`, naming servers, layer and expert, where owners of an expert serve it as different dtypes.

    `shape` is that of layers and experts.
    """
    if len({shard.weight_dtype for _, shard in servers}) == 1:
        return
    owner = {shard.weight_dtype: np.full(shape, -1) for _, shard in servers}
    for index, (name, shard) in enumerate(servers):
        place = _places(shard)
        owner[shard.weight_dtype][place] = index
        for dtype, others in owner.items():
            both = others[place] >= 0
            if dtype != shard.weight_dtype and both.any():
                layer, expert = (int(numbers[both.argmax()]) for numbers in place)
                other_name, other = servers[others[layer, expert]]
                raise ModelMismatch(
                    f"{name} serves weights of layer {layer}, expert {expert} as {shard.weights}, {other_name} as"
                    f" {other.weights}: their answers differ; start both with the same --weights"
                )


def _places(shard: ShardInfo) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Layers and experts of all that is owned, in the order of its digests."""
    counts = [len(experts) for experts in shard.experts.values()]
    experts = np.fromiter((expert for experts in shard.experts.values() for expert in experts), np.int64, sum(counts))
    return np.repeat(np.array(shard.layers, np.int64), counts), experts


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
