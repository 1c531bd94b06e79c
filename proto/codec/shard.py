"""What a server owns and accepts, and the messages of the RPCs beside Execute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import ServerFault
from expertd.proto.codec.tensors import DTYPE_CODES, DTYPES, HIDDEN_DTYPES, REPLY_DTYPES

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
class GenerationInfo:
    """Weights that a server has beside those that serve, of the same experts."""

    model_fingerprint: str
    expert_digests: bytes = b""
    has_manifest: bool = False
    checkpoint_dtypes: tuple[torch.dtype, ...] = ()
    share: float = 0.0
    """Of calls, that should use them."""


@dataclass(frozen=True, slots=True)
class UpdateProgress:
    """How far a change of what a server owns is."""

    read_bytes: int
    total_bytes: int
    ready_layers: int
    total_layers: int


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One of the devices that compute for a server."""

    number: int
    name: str
    lost: bool = False
    room: int = 0
    """Experts of a layer, of one of several devices; 0: not told, or as many as its memory holds."""
    experts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """What it has of each layer, of one of several devices."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What a server owns and accepts."""

    model_fingerprint: str
    placement_epoch: int
    config: Mapping[str, int | float | bool | str | tuple[int, ...]]
    """The fields of `MoeConfig`."""
    experts: Mapping[int, tuple[int, ...]]
    """Global ids owned, ascending, of each layer; layers ascend."""
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
    """`DIGEST_BYTES` for each layer, for each of its experts; empty when they are not told."""
    has_manifest: bool = False
    """Whether the fingerprint is that of a manifest, against which all weights were checked."""
    instruction_set: str = ""
    """What the native core computes with on the CPU; empty when it is not told."""
    weight_dtype: torch.dtype = torch.float8_e4m3fn
    """What the experts' weights are served as."""
    checkpoint_dtypes: tuple[torch.dtype, ...] = ()
    """What the checkpoint's files hold them as; empty when it is not told."""
    metrics_address: str = ""
    """host:port as it is bound; empty when it is not told."""
    admin_address: str = ""
    """Of its administration, as it is bound; empty when it has none."""
    next: GenerationInfo | None = None
    """Other weights that are here as well."""
    update: UpdateProgress | None = None
    """Of a change that is under way."""
    devices: tuple[DeviceInfo, ...] = ()
    """What computes; empty when it is not told."""

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of all weights that are here, those that serve first."""
        return (self.model_fingerprint,) if self.next is None else (self.model_fingerprint, self.next.model_fingerprint)

    def of(self, model_fingerprint: str) -> ShardInfo | None:
        """This, as it is for the weights with this fingerprint, whichever they are; None when they are not here."""
        if model_fingerprint == self.model_fingerprint:
            return self
        if self.next is None or model_fingerprint != self.next.model_fingerprint:
            return None
        return replace(
            self,
            model_fingerprint=model_fingerprint,
            expert_digests=self.next.expert_digests,
            has_manifest=self.next.has_manifest,
            checkpoint_dtypes=self.next.checkpoint_dtypes,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.experts)

    @property
    def routed_experts(self) -> int:
        """Of the whole model, in each layer."""
        return int(self.config["n_routed_experts"])  # type: ignore[arg-type]

    @property
    def weights(self) -> str:
        """For people: "fp8", "bf16", or or of what was not stored so "fp8 of bf16" or "fp8 of mxfp4"."""
        names = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16", torch.float4_e2m1fn_x2: "mxfp4"}
        others = [names[dtype] for dtype in self.checkpoint_dtypes if dtype != self.weight_dtype]
        return " of ".join((names[self.weight_dtype], *([" and ".join(others)] if others else [])))


def encode_shard(shard: ShardInfo) -> pb.GetShardResponse:
    lists = list(shard.experts.values())
    common = set(lists[0]).intersection(*lists) if lists else set()
    alike = all(len(one) == len(common) for one in lists)
    return pb.GetShardResponse(
        model_fingerprint=shard.model_fingerprint,
        placement_epoch=shard.placement_epoch,
        config=pb.ModelConfig(**shard.config),  # type: ignore[arg-type]
        layers=shard.layers,
        experts=sorted(common),
        layer_experts=[] if alike else [pb.ExpertList(experts=one) for one in lists],
        weight_dtype=DTYPE_CODES[shard.weight_dtype],
        metrics_address=shard.metrics_address,
        admin_address=shard.admin_address,
        checkpoint_weight_dtypes=[DTYPE_CODES[dtype] for dtype in shard.checkpoint_dtypes],
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
        next_generation=None if shard.next is None else _encode_generation(shard.next),
        update=None if shard.update is None else pb.UpdateProgress(**asdict(shard.update)),
        devices=[_encode_device(device, shard.layers) for device in shard.devices],
    )


def _encode_device(device: DeviceInfo, layers: Sequence[int]) -> pb.Device:
    lists = [pb.ExpertList(experts=device.experts.get(layer, ())) for layer in layers] if device.experts else []
    return pb.Device(number=device.number, name=device.name, lost=device.lost, room=device.room, layer_experts=lists)


def _encode_generation(generation: GenerationInfo) -> pb.Generation:
    return pb.Generation(
        model_fingerprint=generation.model_fingerprint,
        expert_digests=generation.expert_digests,
        has_manifest=generation.has_manifest,
        checkpoint_weight_dtypes=[DTYPE_CODES[dtype] for dtype in generation.checkpoint_dtypes],
        share=generation.share,
    )


def decode_shard(message: pb.GetShardResponse) -> ShardInfo:
    fields = [one.name for one in pb.ModelConfig.DESCRIPTOR.fields]
    experts = _decode_experts(message)
    return ShardInfo(
        model_fingerprint=message.model_fingerprint,
        placement_epoch=message.placement_epoch,
        config={name: getattr(message.config, name) for name in fields}
        | {"dense_layers": tuple(message.config.dense_layers)},
        experts=experts,
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
        weight_dtype=DTYPES.get(message.weight_dtype, torch.float8_e4m3fn),
        metrics_address=message.metrics_address,
        admin_address=message.admin_address,
        checkpoint_dtypes=_dtypes(message.checkpoint_weight_dtypes),
        next=_decode_generation(message.next_generation) if message.HasField("next_generation") else None,
        update=_decode_progress(message.update) if message.HasField("update") else None,
        devices=tuple(_decode_device(one, experts) for one in message.devices),
    )


def _decode_generation(message: pb.Generation) -> GenerationInfo:
    if not 0.0 <= message.share <= 1.0:
        raise ServerFault(f"share is {message.share}; it must be from 0 to 1")
    return GenerationInfo(
        model_fingerprint=message.model_fingerprint,
        expert_digests=message.expert_digests,
        has_manifest=message.has_manifest,
        checkpoint_dtypes=_dtypes(message.checkpoint_weight_dtypes),
        share=message.share,
    )


def _decode_progress(message: pb.UpdateProgress) -> UpdateProgress:
    return UpdateProgress(message.read_bytes, message.total_bytes, message.ready_layers, message.total_layers)


def _dtypes(codes: Iterable[int]) -> tuple[torch.dtype, ...]:
    return tuple(DTYPES[code] for code in codes if code in DTYPES)


def _decode_experts(message: pb.GetShardResponse) -> dict[int, tuple[int, ...]]:
    lists = [one.experts for one in message.layer_experts] or [message.experts] * len(message.layers)
    if len(lists) != len(message.layers):
        raise ServerFault(f"layer_experts has {len(lists)} lists; there are {len(message.layers)} layers")
    for name, numbers in (("layers", message.layers), *(("experts", one) for one in lists)):
        if list(numbers) != sorted(set(numbers)):
            raise ServerFault(f"{name} are {list(numbers)}; they must ascend")
    most = message.config.n_routed_experts
    if any(one and one[-1] >= most for one in lists):
        raise ServerFault(f"experts hold {max(one[-1] for one in lists if one)}; the model has {most}")
    return {layer: tuple(one) for layer, one in zip(message.layers, lists, strict=True)}


def _decode_device(message: pb.Device, owned: Mapping[int, tuple[int, ...]]) -> DeviceInfo:
    lists = [tuple(one.experts) for one in message.layer_experts]
    if lists and len(lists) != len(owned):
        raise ServerFault(f"device {message.number} tells of {len(lists)} layers; there are {len(owned)}")
    experts = dict(zip(owned, lists, strict=False))
    for layer, its in experts.items():
        if not set(its) <= set(owned[layer]):
            raise ServerFault(f"layer {layer}: device {message.number} has {list(its)}, which are not all owned")
    return DeviceInfo(message.number, message.name, message.lost, message.room, experts)


def decode_report(message: pb.VerifyShardResponse) -> dict[str, int | float | str | None]:
    """The fields of a report; `expert` is None when it is absent."""
    fields = {one.name: getattr(message, one.name) for one in pb.VerifyShardResponse.DESCRIPTOR.fields}
    return fields | {"expert": message.expert if message.HasField("expert") else None}


def message_bytes(tokens: int, hidden_size: int, top_k: int) -> int:
    """Upper bound of the length of a request or response for `tokens` tokens, in bytes."""
    request = tensor_bytes(tokens, hidden_size, top_k)
    response = tokens * hidden_size * 4
    return max(request, response) + ENVELOPE_BYTES


def tensor_bytes(tokens: int, hidden_size: int, top_k: int) -> int:
    """Of a request's tensors at most, which are those of BF16."""
    return tokens * (hidden_size * 2 + top_k * 8)
