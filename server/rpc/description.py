"""What a server tells its callers of itself."""

from __future__ import annotations

from expertd import __version__
from expertd.kernels.numerics.backend import Backend
from expertd.proto import codec
from expertd.proto.codec import ShardInfo
from expertd.server.options.config import ServerConfig
from expertd.server.scheduling.shard import Shard


def describe(config: ServerConfig, shard: Shard, backend: Backend, backend_reason: str) -> ShardInfo:
    """The answer to `GetShard`."""
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
    )
