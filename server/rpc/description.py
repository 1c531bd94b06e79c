"""What a server tells its callers of itself."""

from __future__ import annotations

import dataclasses

from expertd import __version__, _native
from expertd.proto import codec
from expertd.proto.codec import DIGEST_BYTES, DeviceInfo, GenerationInfo, ShardInfo
from expertd.server.options.config import Address, ServerConfig
from expertd.server.scheduling.generations import Generation, Generations
from expertd.server.scheduling.node import Node
from expertd.server.scheduling.shard import Shard


def describe(config: ServerConfig, serving: Generation, node: Node, backend_reason: str) -> ShardInfo:
    """The answer to `GetShard`, but for what is known of weights once they are loaded."""
    shard = serving.shard
    model = shard.config
    return ShardInfo(
        model_fingerprint=shard.model_fingerprint,
        placement_epoch=shard.placement_epoch,
        config=shard.config_fields,
        experts=shard.experts,
        max_tokens_per_request=config.max_tokens_per_request,
        max_message_bytes=codec.message_bytes(
            config.max_tokens_per_request, model.hidden_size, model.num_experts_per_tok
        ),
        max_queued_tokens=config.max_queued_tokens,
        max_queued_bytes=config.max_queued_bytes,
        backend=node.devices[0].backend.name,
        device=node.name,
        backend_reason=backend_reason,
        version=__version__,
        locality=config.locality,
        has_manifest=serving.ledger.manifest is not None,
        weight_dtype=shard.weight_dtype,
        instruction_set=_native.instruction_set(),
        devices=_devices(node),
    )


def as_loaded(
    info: ShardInfo, generations: Generations, node: Node, metrics_address: Address, admin_address: Address | None
) -> ShardInfo:
    """The answer to `GetShard`, now that all weights are loaded."""
    return dataclasses.replace(
        owning(info, generations, node), metrics_address=str(metrics_address), admin_address=str(admin_address or "")
    )


def owning(info: ShardInfo, generations: Generations, node: Node) -> ShardInfo:
    """The answer to `GetShard` of a server that answers with `generations`, all of which are loaded."""
    serving, following = generations.serving, generations.next
    return dataclasses.replace(
        info,
        model_fingerprint=serving.fingerprint,
        experts=serving.shard.experts,
        expert_digests=_digests(serving),
        has_manifest=serving.ledger.manifest is not None,
        checkpoint_dtypes=serving.stored,
        next=None if following is None else _next(following, generations.share),
        devices=_devices(node, serving.shard),
    )


def _next(generation: Generation, share: float) -> GenerationInfo:
    return GenerationInfo(
        model_fingerprint=generation.fingerprint,
        expert_digests=_digests(generation),
        has_manifest=generation.ledger.manifest is not None,
        checkpoint_dtypes=generation.stored,
        share=share,
    )


def _devices(node: Node, shard: Shard | None = None) -> tuple[DeviceInfo, ...]:
    """With what each of several has, of a `shard` that is loaded."""
    several = len(node.devices) > 1
    held = {layer: node.arrangement(shard.key(layer)) for layer in shard.layers} if several and shard else {}
    return tuple(
        DeviceInfo(
            one.number,
            one.backend.device,
            one.lost is not None,
            node.room if several else 0,
            {} if one.lost else {layer: its[place] for layer, its in held.items()},
        )
        for place, one in enumerate(node.devices)
    )


def _digests(generation: Generation) -> bytes:
    return generation.ledger.found(generation.shard.experts, DIGEST_BYTES)
