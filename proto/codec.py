"""Tensors to messages and back: the only place that knows how expertd's types look on the wire.

Decoded tensors share the message's memory and are read-only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from crc32c import crc32c
from google.protobuf.message import DecodeError
from torch import Tensor

from expertd.proto import expert_shard_pb2 as pb
from expertd.proto import wire
from expertd.proto.base.errors import ExpertdError, InvalidBatch, ServerFault, error_from_status
from expertd.proto.lane.layout import QUANTIZATION_BLOCK, Layout, SharedSegment, lay_out

ShardRequest = pb.GetShardRequest
ShardResponse = pb.GetShardResponse
VerifyRequest = pb.VerifyShardRequest
VerifyResponse = pb.VerifyShardResponse
RegistrationRequest = pb.RegisterSharedMemoryRequest
Registration = pb.RegisterSharedMemoryResponse
EMPTY = memoryview(b"")
PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata of a refused unary call: milliseconds until the server expects to have room."""
SERVICE = pb.DESCRIPTOR.services_by_name["ExpertShard"].full_name
ENVELOPE_BYTES = 64 * 1024
"""More than all the fields of a message beside its tensors, receipt included."""
MAX_REQUEST_FIELDS = 64
"""Known or not: what reading a request costs is bounded before it is read."""
CANCELLATION_ID = 2**64 - 1
"""The request_id of messages that cancel other requests; coordinators number theirs from 1."""

with warnings.catch_warnings():
    # torch warns once a process that such a tensor is read-only, which is the intent here: let it do so now, unheard.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

_DTYPE_CODES: dict[torch.dtype, pb.DType] = {
    torch.float8_e4m3fn: pb.DTYPE_FLOAT8_E4M3FN,
    torch.bfloat16: pb.DTYPE_BFLOAT16,
    torch.float32: pb.DTYPE_FLOAT32,
}
HIDDEN_DTYPES = (torch.float8_e4m3fn, torch.bfloat16)
REPLY_DTYPES = (torch.float32, torch.bfloat16)


_Bytes: TypeAlias = memoryview | Tensor
"""What a tensor's bytes lie in: a message or segment, or [n] uint8 on a GPU."""


@dataclass(frozen=True, slots=True)
class ExecuteCall:
    """One batch for one server, as both ends see it."""

    request_id: int
    model_fingerprint: str
    placement_epoch: int | None
    """The server refuses the call when its placement has changed since; None: do not check."""
    layer: int
    hidden: Tensor
    """[T, H] float8_e4m3fn with `scales`, or bfloat16 without."""
    scales: Tensor | None
    """[T, H/128] float32."""
    expert_ids: Tensor
    """[T, k] int32 global expert ids, -1 for a slot that is not for this server."""
    weights: Tensor
    """[T, k] float32."""
    reply_dtype: torch.dtype
    timeout: float | None = None
    """Seconds after which the server need not compute it any more."""
    traceparent: str = ""
    """The caller's span (W3C Trace Context); empty when the call is not traced."""
    reply_into: Tensor | None = None
    """[T, H] of `reply_dtype` in shared memory, where the partials belong; None: in the reply."""


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Seconds that one request spent in each stage of a server."""

    decode: float = 0.0
    queue: float = 0.0
    copy_in: float = 0.0
    compute: float = 0.0
    copy_out: float = 0.0

    @property
    def total(self) -> float:
        return self.decode + self.queue + self.copy_in + self.compute + self.copy_out


@dataclass(frozen=True, slots=True)
class ExecuteResult:
    """Partial sums of one call, with the receipt for what they contain."""

    request_id: int
    partials: Tensor
    """[T, H] of the call's reply dtype."""
    receipt: Mapping[int, int]
    """Computed (token, expert) pairs by global expert id; experts without pairs are absent."""
    timings: StageTimings


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


_REQUEST_FIELDS: wire.Schema = {
    1: ("request_id", wire.VARINT),
    2: ("model_fingerprint", wire.BYTES),
    3: ("placement_epoch", wire.VARINT),
    4: ("layer", wire.VARINT),
    5: ("num_tokens", wire.VARINT),
    6: ("top_k", wire.VARINT),
    7: ("hidden_dtype", wire.VARINT),
    8: ("reply_dtype", wire.VARINT),
    9: ("hidden", wire.BYTES),
    10: ("hidden_scales", wire.BYTES),
    11: ("expert_ids", wire.BYTES),
    12: ("weights", wire.BYTES),
    13: ("timeout_us", wire.VARINT),
    14: ("segment_offset", wire.VARINT),
    15: ("traceparent", wire.BYTES),
    16: ("cancels", wire.VARINT),
    17: ("gpu_offset", wire.VARINT),
}
_RESPONSE_FIELDS: wire.Schema = {
    1: ("request_id", wire.VARINT),
    2: ("error", wire.BYTES),
    3: ("partials_dtype", wire.VARINT),
    4: ("partials", wire.BYTES),
    5: ("receipt_experts", wire.REPEATED),
    6: ("receipt_pairs", wire.REPEATED),
    7: ("timings", wire.BYTES),
    8: ("checksum", wire.FIXED32),
}
_STAGES = tuple(StageTimings.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class RawRequest:
    """The fields of an ExecuteRequest, unchecked; tensors are views of the received bytes, or of a segment's."""

    request_id: int = 0
    model_fingerprint: memoryview = EMPTY
    placement_epoch: int | None = None
    layer: int = 0
    num_tokens: int = 0
    top_k: int = 0
    hidden_dtype: int = 0
    reply_dtype: int = 0
    hidden: memoryview = EMPTY
    hidden_scales: memoryview = EMPTY
    expert_ids: memoryview = EMPTY
    weights: memoryview = EMPTY
    timeout_us: int = 0
    traceparent: memoryview = EMPTY
    segment_offset: int | None = None
    cancels: int | None = None
    gpu_offset: int | None = None

    @property
    def num_tensor_bytes(self) -> int:
        return len(self.hidden) + len(self.hidden_scales) + len(self.expert_ids) + len(self.weights)


@dataclass(frozen=True, slots=True)
class RawResponse:
    """The fields of an ExecuteResponse, unchecked; the partials are a view of the received bytes."""

    request_id: int = 0
    error: memoryview | None = None
    partials_dtype: int = 0
    partials: memoryview = EMPTY
    timings: memoryview = EMPTY
    checksum: memoryview = EMPTY
    receipt_experts: Sequence[int] = ()
    receipt_pairs: Sequence[int] = ()


def encode_call(call: ExecuteCall, segment_offset: int | None = None, gpu_offset: int | None = None) -> bytes:
    """The ExecuteRequest of `call`; with offsets, one whose tensors lie in a shared segment and in GPU memory."""
    fingerprint = call.model_fingerprint.encode()
    epoch = call.placement_epoch
    timeout_us = 0 if call.timeout is None else max(1, int(call.timeout * 1e6))
    hidden = scales = ids = weights = EMPTY
    if segment_offset is None:
        hidden, ids, weights = map(_buffer, (call.hidden, call.expert_ids, call.weights))
        scales = EMPTY if call.scales is None else _buffer(call.scales)
    return b"".join(
        (
            wire.varint_field(1, call.request_id),
            wire.bytes_header(2, len(fingerprint)),
            fingerprint,
            # Explicit presence: zero is not the same as absent.
            b"" if epoch is None else wire.varint(3 << 3) + wire.varint(epoch),
            wire.varint_field(4, call.layer),
            wire.varint_field(5, call.hidden.shape[0]),
            wire.varint_field(6, call.expert_ids.shape[1]),
            wire.varint_field(7, _DTYPE_CODES[call.hidden.dtype]),
            wire.varint_field(8, _DTYPE_CODES[call.reply_dtype]),
            wire.bytes_header(9, len(hidden)),
            hidden,
            wire.bytes_header(10, len(scales)),
            scales,
            wire.bytes_header(11, len(ids)),
            ids,
            wire.bytes_header(12, len(weights)),
            weights,
            wire.varint_field(13, timeout_us),
            b"" if segment_offset is None else wire.varint(14 << 3) + wire.varint(segment_offset),
            wire.bytes_header(15, len(call.traceparent)),
            call.traceparent.encode("ascii"),
            b"" if gpu_offset is None else wire.varint(17 << 3) + wire.varint(gpu_offset),
        )
    )


def segment_layout(request: RawRequest, width: int) -> Layout | None:
    """Where the tensors of `request` belong in a segment; None for one that is to be refused, or has none."""
    dtypes: dict[int, torch.dtype] = {code: dtype for dtype, code in _DTYPE_CODES.items()}
    hidden_dtype, reply_dtype = dtypes.get(request.hidden_dtype), dtypes.get(request.reply_dtype)
    if hidden_dtype not in HIDDEN_DTYPES or reply_dtype not in REPLY_DTYPES:
        return None
    if request.segment_offset is not None or request.gpu_offset is not None or not request.hidden:
        return None
    layout = lay_out(0, None, request.num_tokens, width, request.top_k, hidden_dtype, reply_dtype)
    tensors = (request.hidden, request.hidden_scales, request.expert_ids, request.weights)
    places = (layout.hidden, layout.hidden_scales, layout.expert_ids, layout.weights)
    fits = all(len(tensor) == place.stop - place.start for tensor, place in zip(tensors, places, strict=True))
    return layout if fits else None


def encode_cancellation(request_id: int) -> bytes:
    """The message that cancels request `request_id` of the same stream."""
    return wire.varint_field(1, CANCELLATION_ID) + wire.varint(16 << 3) + wire.varint(request_id)


def encode_request(request: RawRequest) -> bytes:
    """The ExecuteRequest that `parse_request` reads as `request`."""
    parts: list[bytes | memoryview] = []
    for number, (name, kind) in _REQUEST_FIELDS.items():
        value = getattr(request, name)
        if kind == wire.VARINT and value is not None:
            parts += (wire.varint(number << 3), wire.varint(value))
        elif kind == wire.BYTES:
            parts += (wire.bytes_header(number, len(value)), value)
    return b"".join(parts)


def parse_request(data: bytes) -> RawRequest:
    """Read a serialized ExecuteRequest; bytes that are none raise `InvalidBatch`."""
    try:
        return RawRequest(**wire.read_known(memoryview(data), _REQUEST_FIELDS, MAX_REQUEST_FIELDS))  # type: ignore[arg-type]
    except wire.MalformedMessage as error:
        name = pb.ExecuteRequest.DESCRIPTOR.full_name
        raise InvalidBatch(f"the {len(data)} bytes received are no {name}: {error}") from None


def check_is_request(message: RawRequest) -> None:
    """Raise `InvalidBatch` for a message that cancels a request."""
    if message.cancels is not None:
        raise InvalidBatch(f"cancels is {message.cancels}; it is for requests of a stream: end this call instead")


def decode_call(
    message: RawRequest, width: int, max_top_k: int, max_tokens: int, segment: SharedSegment | None = None
) -> ExecuteCall:
    """Read a request of at most `max_tokens` tokens for a model of hidden size `width` and top-k `max_top_k`.

    Its tensors are in `segment` where one is given. Raises `InvalidBatch` when a size or dtype is outside the contract.
    """
    check_is_request(message)
    tokens, top_k = message.num_tokens, message.top_k
    _check_range("num_tokens", tokens, 1, max_tokens)
    _check_range("top_k", top_k, 1, max_top_k)
    hidden_dtype = _check_dtype("hidden_dtype", message.hidden_dtype, HIDDEN_DTYPES)
    reply_dtype = _check_dtype("reply_dtype", message.reply_dtype, REPLY_DTYPES)
    parts: Sequence[_Bytes] = (message.hidden, message.hidden_scales, message.expert_ids, message.weights)
    partials: _Bytes | None = None
    if segment is not None:
        offsets = message.segment_offset or 0, message.gpu_offset
        layout = lay_out(*offsets, tokens, width, top_k, hidden_dtype, reply_dtype)
        *parts, partials = _in_segment(message, segment, layout)
    elif message.segment_offset is not None or message.gpu_offset is not None:
        name = "gpu_offset" if message.segment_offset is None else "segment_offset"
        raise InvalidBatch(f"{name} is {getattr(message, name)}; there is no segment: send the tensors")
    hidden, hidden_scales, expert_ids, weights = parts
    quantized = hidden_dtype == torch.float8_e4m3fn
    scales_shape = (tokens if quantized else 0, width // QUANTIZATION_BLOCK)
    scales = _from_bytes("hidden_scales", hidden_scales, torch.float32, scales_shape)
    return ExecuteCall(
        request_id=message.request_id,
        model_fingerprint=str(message.model_fingerprint, "utf-8", "surrogateescape"),
        placement_epoch=message.placement_epoch,
        layer=message.layer,
        hidden=_from_bytes("hidden", hidden, hidden_dtype, (tokens, width)),
        scales=scales if quantized else None,
        expert_ids=_from_bytes("expert_ids", expert_ids, torch.int32, (tokens, top_k)),
        weights=_from_bytes("weights", weights, torch.float32, (tokens, top_k)),
        reply_dtype=reply_dtype,
        timeout=message.timeout_us / 1e6 if message.timeout_us else None,
        traceparent=str(message.traceparent, "ascii", "replace"),
        reply_into=None if partials is None else _from_bytes("partials", partials, reply_dtype, (tokens, width)),
    )


def encode_result(result: ExecuteResult) -> bytes:
    """The ExecuteResponse of `result`."""
    partials = _buffer(result.partials)
    timings = _write_timings(result.timings)
    return b"".join(
        (
            wire.varint_field(1, result.request_id),
            wire.varint_field(3, _DTYPE_CODES[result.partials.dtype]),
            wire.bytes_header(4, len(partials)),
            partials,
            wire.packed_field(5, tuple(result.receipt.keys())),
            wire.packed_field(6, tuple(result.receipt.values())),
            wire.varint(7 << 3 | wire.BYTES),
            wire.varint(len(timings)),
            timings,
            wire.varint(8 << 3 | wire.FIXED32),
            _checksum(result.request_id, partials),
        )
    )


def add_partials(response: bytes, request_id: int, partials: memoryview) -> bytes:
    """The ExecuteResponse `response`, whose partials are in shared memory, with them in it."""
    # Of fields that occur twice the last one counts: this checksum, not the one of a response without partials.
    checksum = wire.varint(8 << 3 | wire.FIXED32), _checksum(request_id, partials)
    return b"".join((response, wire.bytes_header(4, len(partials)), partials, *checksum))


def encode_error(request_id: int, error: ExpertdError) -> bytes:
    """The ExecuteResponse that refuses request `request_id` of a stream."""
    code: int = error.code.value[0]
    delay = 0 if error.retry_after is None else whole_milliseconds(error.retry_after)
    refusal = pb.ExecuteResponse(
        request_id=request_id, error=pb.Error(code=code, message=str(error), retry_after_ms=delay)
    )
    return refusal.SerializeToString()


def parse_response(data: bytes | bytearray) -> RawResponse:
    """Read a serialized ExecuteResponse; bytes that are none raise `ServerFault`."""
    try:
        return RawResponse(**wire.read_known(memoryview(data), _RESPONSE_FIELDS, len(data)))  # type: ignore[arg-type]
    except wire.MalformedMessage as error:
        raise ServerFault(f"malformed response of {len(data)} bytes: {error}") from None


def decode_result(
    message: RawResponse, tokens: int, width: int, dtype: torch.dtype, shared: Tensor | None = None
) -> ExecuteResult:
    """Read a response that must hold partials [tokens, width] of `dtype`, or leave them in `shared` [n] uint8.

    Raises the error that the response carries, or `ServerFault` when it is not what was asked for.
    """
    if message.error is not None:
        raise read_error(message.error)
    if message.checksum != _checksum(message.request_id, message.partials):
        raise ServerFault("the response was altered on its way: its checksum does not match its partials")
    try:
        _check_dtype("partials_dtype", message.partials_dtype, (dtype,))
        data = message.partials if shared is None else shared
        partials = _from_bytes("partials", data, dtype, (tokens, width))
        timings = _read_timings(message.timings)
        receipt = dict(zip(message.receipt_experts, message.receipt_pairs, strict=True))
    except (InvalidBatch, ValueError, DecodeError) as error:
        raise ServerFault(f"malformed response: {error}") from None
    return ExecuteResult(message.request_id, partials, receipt, timings)


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
        hidden_dtypes=[_DTYPE_CODES[dtype] for dtype in HIDDEN_DTYPES],
        reply_dtypes=[_DTYPE_CODES[dtype] for dtype in REPLY_DTYPES],
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


def whole_milliseconds(seconds: float) -> int:
    """Rounded up, so that no delay becomes none."""
    return math.ceil(seconds * 1e3)


def read_error(message: memoryview) -> ExpertdError:
    try:
        error = pb.Error.FromString(bytes(message))
    except DecodeError as malformed:
        return ServerFault(f"malformed response: {malformed}")
    return error_from_status(error.code, error.message, error.retry_after_ms / 1e3 or None)


def _checksum(request_id: int, partials: memoryview) -> bytes:
    return crc32c(partials, crc32c(request_id.to_bytes(8, "little"))).to_bytes(4, "little")


def _write_timings(timings: StageTimings) -> bytes:
    nanoseconds = {f"{stage}_ns": round(getattr(timings, stage) * 1e9) for stage in _STAGES}
    return pb.Timings(**nanoseconds).SerializeToString()


def _read_timings(message: memoryview) -> StageTimings:
    timings = pb.Timings.FromString(bytes(message))
    return StageTimings(*(getattr(timings, f"{stage}_ns") / 1e9 for stage in _STAGES))


def flat_bytes(tensor: Tensor) -> Tensor:
    """[n] uint8: the bytes of a tensor; a copy only when it is not contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _buffer(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, flat; a copy only when it is not contiguous or on a GPU."""
    return flat_bytes(tensor).cpu().numpy().data


def _in_segment(message: RawRequest, segment: SharedSegment, layout: Layout) -> tuple[_Bytes, ...]:
    """Hidden states, scales, ids and weights from `segment`, which the caller can change at any time, and the partials.

    What is checked is copied first: ids, weights, and scales that are not on a GPU. Everything else is read in place:
    every byte of it is a value, and a token's values reach no other token's result.
    """
    if message.segment_offset is None:
        raise InvalidBatch("segment_offset is missing; tensors of this connection lie in its segment")
    if message.hidden or message.hidden_scales or message.expert_ids or message.weights:
        raise InvalidBatch("hidden, hidden_scales, expert_ids and weights must be empty beside segment_offset")
    memory, gpu = segment.memory, segment.gpu
    _check_end("segment_offset", message.segment_offset, layout.end, len(memory))
    ids, weights = (memoryview(bytes(memory[place])) for place in (layout.expert_ids, layout.weights))
    if not layout.on_gpu:
        scales = memoryview(bytes(memory[layout.hidden_scales]))
        return memory[layout.hidden], scales, ids, weights, memory[layout.partials]
    if gpu is None:
        raise InvalidBatch(f"gpu_offset is {message.gpu_offset}; no GPU memory was handed over with the segment")
    _check_end("gpu_offset", message.gpu_offset, layout.gpu_end, len(gpu))
    return gpu[layout.hidden], gpu[layout.hidden_scales], ids, weights, gpu[layout.partials]


def _check_end(field: str, offset: int | None, end: int, size: int) -> None:
    if end > size:
        what = "segment" if field == "segment_offset" else "GPU memory"
        raise InvalidBatch(f"{field} is {offset} and the call's tensors end at byte {end}; the {what} has {size}")


def _from_bytes(field: str, data: _Bytes, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """`data`, or what a tensor [n] uint8 holds, as a tensor of `dtype`."""
    expected = shape[0] * shape[1] * dtype.itemsize
    if len(data) != expected:
        rows, columns = shape
        name = str(dtype).removeprefix("torch.")
        raise InvalidBatch(f"{field} has {len(data)} bytes; [{rows}, {columns}] {name} takes {expected}")
    if not expected:
        return torch.empty(shape, dtype=dtype)
    values = data.view(dtype) if isinstance(data, Tensor) else torch.frombuffer(data, dtype=dtype)
    return values.view(shape)


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidBatch(f"{field} is {value}; it must be from {low} to {high}")


def _check_dtype(field: str, code: int, accepted: tuple[torch.dtype, ...]) -> torch.dtype:
    for dtype in accepted:
        if _DTYPE_CODES[dtype] == code:
            return dtype
    names = {value: name for name, value in pb.DType.items()}
    choices = ", ".join(names[_DTYPE_CODES[dtype]] for dtype in accepted)
    raise InvalidBatch(f"{field} is {names.get(code, code)}; accepted: {choices}")
