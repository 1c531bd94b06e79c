"""What a server tells its callers of itself."""

from __future__ import annotations

import dataclasses

import torch

from expertd import __version__, _native
from expertd.kernels.numerics.backend import Backend
from expertd.kernels.weights.ledger import Ledger
from expertd.proto import codec
from expertd.proto.codec import DIGEST_BYTES, ShardInfo
from expertd.server.options.config import Address, ServerConfig
from expertd.server.scheduling.shard import Shard


def describe(config: ServerConfig, shard: Shard, ledger: Ledger, backend: Backend, backend_reason: str) -> ShardInfo:
    """The answer to `GetShard`, but for what is known of weights once they are loaded."""
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
        backend=backend.name,
        device=backend.device,
        backend_reason=backend_reason,
        version=__version__,
        locality=config.locality,
        has_manifest=ledger.manifest is not None,
        weight_dtype=shard.weight_dtype,
        instruction_set=_native.instruction_set(),
    )


def as_loaded(
    info: ShardInfo,
    shard: Shard,
    ledger: Ledger,
    metrics_address: Address,
    admin_address: Address | None,
    stored: tuple[torch.dtype, ...],
) -> ShardInfo:
    """The answer to `GetShard`, now that all of `shard` is loaded, from files with `stored` weights."""
    return dataclasses.replace(
        owning(info, shard, ledger),
        metrics_address=str(metrics_address),
        admin_address=str(admin_address or ""),
        checkpoint_dtypes=stored,
    )


def owning(info: ShardInfo, shard: Shard, ledger: Ledger) -> ShardInfo:
    """The answer to `GetShard` of a server that owns `shard`, all of which is loaded."""
    return dataclasses.replace(info, experts=shard.experts, expert_digests=ledger.found(shard.experts, DIGEST_BYTES))
