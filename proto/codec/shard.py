"""What a server owns and accepts, and the messages of the RPCs beside Execute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import InvalidBatch
from expertd.proto.codec.tensors import DTYPE_CODES, HIDDEN_DTYPES, REPLY_DTYPES

SERVICE = pb.DESCRIPTOR.services_by_name["ExpertShard"].full_name
ShardRequest = pb.GetShardRequest
ShardResponse = pb.GetShardResponse
VerifyRequest = pb.VerifyShardRequest
VerifyResponse = pb.VerifyShardResponse
RegistrationRequest = pb.RegisterSharedMemoryRequest
Registration = pb.RegisterSharedMemoryResponse
ENVELOPE_BYTES = 64 * 1024
"""More than all the fields of a message beside its tensors, receipt included."""


DIGEST_BYTES = 16
"""Of each expert's SHA-256 that `GetShard` tells."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What a server owns and accepts."""

    model_fingerprint: str
    placement_epoch: int
    config: Mapping[str, int | float | bool | str | tuple[int, ...]]
    """The fields of `MoeConfig`."""
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    max_tokens_per_request: int
    max_message_bytes: int
    max_queued_tokens: int
    max_queued_bytes: int
    backend: str
    device: str
    backend_reason: str
    version: str
    locality: str
    expert_digests: bytes = b""
    """`DIGEST_BYTES` for each of `layers`, for each of `experts`; empty when they are not told."""
    has_manifest: bool = False
    """Whether the fingerprint is that of a manifest, against which all weights were checked."""
    instruction_set: str = ""
    """What the native core computes with on the CPU; empty when it is not told."""


def check_shard_request(data: bytes) -> None:
    """Raise `InvalidBatch` for bytes that are no GetShardRequest."""
    try:
        ShardRequest.FromString(data)
    except DecodeError as error:
        name = ShardRequest.DESCRIPTOR.full_name
        raise InvalidBatch(f"the {len(data)} bytes received are no {name}: {error}") from None


def encode_shard(shard: ShardInfo) -> pb.GetShardResponse:
    return pb.GetShardResponse(
        model_fingerprint=shard.model_fingerprint,
        placement_epoch=shard.placement_epoch,
        config=pb.ModelConfig(**shard.config),  # type: ignore[arg-type]
        layers=shard.layers,
        experts=shard.experts,
        weight_dtype=pb.DTYPE_FLOAT8_E4M3FN,
        hidden_dtypes=[DTYPE_CODES[dtype] for dtype in HIDDEN_DTYPES],
        reply_dtypes=[DTYPE_CODES[dtype] for dtype in REPLY_DTYPES],
        limits=pb.Limits(
            max_tokens_per_request=shard.max_tokens_per_request,
            max_message_bytes=shard.max_message_bytes,
            max_queued_tokens=shard.max_queued_tokens,
            max_queued_bytes=shard.max_queued_bytes,
        ),
        backend=shard.backend,
        device=shard.device,
        backend_reason=shard.backend_reason,
        version=shard.version,
        locality=shard.locality,
        expert_digests=shard.expert_digests,
        has_manifest=shard.has_manifest,
        instruction_set=shard.instruction_set,
    )


def decode_shard(message: pb.GetShardResponse) -> ShardInfo:
    fields = [field.name for field in pb.ModelConfig.DESCRIPTOR.fields]
    return ShardInfo(
        model_fingerprint=message.model_fingerprint,
        placement_epoch=message.placement_epoch,
        config={name: getattr(message.config, name) for name in fields}
        | {"dense_layers": tuple(message.config.dense_layers)},
        layers=tuple(message.layers),
        experts=tuple(message.experts),
        max_tokens_per_request=message.limits.max_tokens_per_request,
        max_message_bytes=message.limits.max_message_bytes,
        max_queued_tokens=message.limits.max_queued_tokens,
        max_queued_bytes=message.limits.max_queued_bytes,
        backend=message.backend,
        device=message.device,
        backend_reason=message.backend_reason,
        version=message.version,
        locality=message.locality,
        expert_digests=message.expert_digests,
        has_manifest=message.has_manifest,
        instruction_set=message.instruction_set,
    )


def decode_report(message: pb.VerifyShardResponse) -> dict[str, int | float | str | None]:
    """The fields of a report; `expert` is None when it is absent."""
    fields = {field.name: getattr(message, field.name) for field in pb.VerifyShardResponse.DESCRIPTOR.fields}
    return fields | {"expert": message.expert if message.HasField("expert") else None}


def message_bytes(tokens: int, hidden_size: int, top_k: int) -> int:
    """Upper bound of the length of a request or response for `tokens` tokens, in bytes."""
    request = tokens * (hidden_size * 2 + top_k * 8)
    response = tokens * hidden_size * 4
    return max(request, response) + ENVELOPE_BYTES
