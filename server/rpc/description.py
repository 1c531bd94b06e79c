"""What a server tells its callers of itself."""

from __future__ import annotations

import dataclasses

from expertd import __version__, _native
from expertd.kernels.numerics.backend import Backend
from expertd.kernels.weights.ledger import Ledger
from expertd.proto import codec
from expertd.proto.codec import DIGEST_BYTES, ShardInfo
from expertd.server.options.config import ServerConfig
from expertd.server.scheduling.shard import Shard


def describe(config: ServerConfig, shard: Shard, ledger: Ledger, backend: Backend, backend_reason: str) -> ShardInfo:
    """The answer to `GetShard`, but for the digests of what is yet to be loaded."""
    model = shard.config
    return ShardInfo(
        model_fingerprint=shard.model_fingerprint,
        placement_epoch=shard.placement_epoch,
        config=shard.config_fields,
        layers=shard.layers,
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
        instruction_set=_native.instruction_set(),
    )


def with_digests(info: ShardInfo, ledger: Ledger) -> ShardInfo:
    """The answer to `GetShard`, now that all of `info.experts` are loaded."""
    return dataclasses.replace(info, expert_digests=ledger.found(info.layers, info.experts, DIGEST_BYTES))
