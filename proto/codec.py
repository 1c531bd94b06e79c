"""Tensors to messages and back: the only place that knows how expertd's types look on the wire.

Decoded tensors share the message's memory and are read-only.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.errors import ExpertdError, InvalidBatch, ServerFault, error_from_status

Request = pb.ExecuteRequest
Response = pb.ExecuteResponse
ShardRequest = pb.GetShardRequest
ShardResponse = pb.GetShardResponse
SERVICE = pb.DESCRIPTOR.services_by_name["ExpertShard"].full_name
BLOCK = 128
ENVELOPE_BYTES = 64 * 1024
"""More than all the fields of a message beside its tensors, receipt included."""

with warnings.catch_warnings():
    # torch warns once a process that such a tensor is read-only, which is the intent here: let it do so now, unheard.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

_DTYPES: dict[pb.DType, torch.dtype] = {
    pb.DTYPE_FLOAT8_E4M3FN: torch.float8_e4m3fn,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_FLOAT32: torch.float32,
}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
HIDDEN_DTYPES = (torch.float8_e4m3fn, torch.bfloat16)
REPLY_DTYPES = (torch.float32, torch.bfloat16)


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
    config: Mapping[str, int | float | bool | str]
    """Fields of the model's config.json."""
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    max_tokens_per_request: int
    max_message_bytes: int
    max_queued_tokens: int
    backend: str
    device: str
    backend_reason: str
    version: str


def parse_request(data: bytes) -> Request:
    """Parse a serialized request; bytes that are none raise `InvalidBatch`."""
    try:
        return Request.FromString(data)
    except DecodeError as error:
        raise InvalidBatch(f"the {len(data)} bytes received are no {Request.DESCRIPTOR.full_name}: {error}") from None


def encode_call(call: ExecuteCall) -> pb.ExecuteRequest:
    return pb.ExecuteRequest(
        request_id=call.request_id,
        model_fingerprint=call.model_fingerprint,
        placement_epoch=call.placement_epoch,
        layer=call.layer,
        num_tokens=call.hidden.shape[0],
        top_k=call.expert_ids.shape[1],
        hidden_dtype=_DTYPE_CODES[call.hidden.dtype],
        reply_dtype=_DTYPE_CODES[call.reply_dtype],
        hidden=_to_bytes(call.hidden),
        hidden_scales=b"" if call.scales is None else _to_bytes(call.scales),
        expert_ids=_to_bytes(call.expert_ids),
        weights=_to_bytes(call.weights),
        timeout_us=0 if call.timeout is None else max(1, int(call.timeout * 1e6)),
    )


def decode_call(message: pb.ExecuteRequest, width: int, max_top_k: int, max_tokens: int) -> ExecuteCall:
    """Read a request of at most `max_tokens` tokens for a model of hidden size `width` and top-k `max_top_k`.

    Raises `InvalidBatch` when a size or dtype is outside the contract.
    """
    tokens, top_k = message.num_tokens, message.top_k
    _check_range("num_tokens", tokens, 1, max_tokens)
    _check_range("top_k", top_k, 1, max_top_k)
    hidden_dtype = _check_dtype("hidden_dtype", message.hidden_dtype, HIDDEN_DTYPES)
    quantized = hidden_dtype == torch.float8_e4m3fn
    scales = _from_bytes(
        "hidden_scales", message.hidden_scales, torch.float32, (tokens if quantized else 0, width // BLOCK)
    )
    return ExecuteCall(
        request_id=message.request_id,
        model_fingerprint=message.model_fingerprint,
        placement_epoch=message.placement_epoch if message.HasField("placement_epoch") else None,
        layer=message.layer,
        hidden=_from_bytes("hidden", message.hidden, hidden_dtype, (tokens, width)),
        scales=scales if quantized else None,
        expert_ids=_from_bytes("expert_ids", message.expert_ids, torch.int32, (tokens, top_k)),
        weights=_from_bytes("weights", message.weights, torch.float32, (tokens, top_k)),
        reply_dtype=_check_dtype("reply_dtype", message.reply_dtype, REPLY_DTYPES),
        timeout=message.timeout_us / 1e6 if message.timeout_us else None,
    )


def encode_result(result: ExecuteResult) -> pb.ExecuteResponse:
    timings = result.timings
    return pb.ExecuteResponse(
        request_id=result.request_id,
        partials_dtype=_DTYPE_CODES[result.partials.dtype],
        partials=_to_bytes(result.partials),
        receipt_experts=list(result.receipt.keys()),
        receipt_pairs=list(result.receipt.values()),
        timings=pb.Timings(
            decode_ns=_nanoseconds(timings.decode),
            queue_ns=_nanoseconds(timings.queue),
            copy_in_ns=_nanoseconds(timings.copy_in),
            compute_ns=_nanoseconds(timings.compute),
            copy_out_ns=_nanoseconds(timings.copy_out),
        ),
    )


def decode_result(message: pb.ExecuteResponse, tokens: int, width: int, dtype: torch.dtype) -> ExecuteResult:
    """Read a response that must hold partials [tokens, width] of `dtype`.

    Raises the error that the response carries, or `ServerFault` when it is not what was asked for.
    """
    if message.HasField("error"):
        raise error_from_status(message.error.code, message.error.message)
    try:
        _check_dtype("partials_dtype", message.partials_dtype, (dtype,))
        partials = _from_bytes("partials", message.partials, dtype, (tokens, width))
    except InvalidBatch as error:
        raise ServerFault(f"malformed response: {error}") from None
    if len(message.receipt_experts) != len(message.receipt_pairs):
        raise ServerFault("malformed response: receipt_experts and receipt_pairs differ in length")
    timings = message.timings
    return ExecuteResult(
        request_id=message.request_id,
        partials=partials,
        receipt=dict(zip(message.receipt_experts, message.receipt_pairs, strict=True)),
        timings=StageTimings(
            decode=timings.decode_ns / 1e9,
            queue=timings.queue_ns / 1e9,
            copy_in=timings.copy_in_ns / 1e9,
            compute=timings.compute_ns / 1e9,
            copy_out=timings.copy_out_ns / 1e9,
        ),
    )


def encode_error(request_id: int, error: ExpertdError) -> pb.ExecuteResponse:
    code: int = error.code.value[0]
    return pb.ExecuteResponse(request_id=request_id, error=pb.Error(code=code, message=str(error)))


def encode_shard(shard: ShardInfo) -> pb.GetShardResponse:
    response = pb.GetShardResponse(
        model_fingerprint=shard.model_fingerprint,
        placement_epoch=shard.placement_epoch,
        layers=shard.layers,
        experts=shard.experts,
        weight_dtype=pb.DTYPE_FLOAT8_E4M3FN,
        hidden_dtypes=[_DTYPE_CODES[dtype] for dtype in HIDDEN_DTYPES],
        reply_dtypes=[_DTYPE_CODES[dtype] for dtype in REPLY_DTYPES],
        limits=pb.Limits(
            max_tokens_per_request=shard.max_tokens_per_request,
            max_message_bytes=shard.max_message_bytes,
            max_queued_tokens=shard.max_queued_tokens,
        ),
        backend=shard.backend,
        device=shard.device,
        backend_reason=shard.backend_reason,
        version=shard.version,
    )
    for name, value in shard.config.items():
        setattr(response.config, name, value)
    return response


def decode_shard(message: pb.GetShardResponse) -> ShardInfo:
    fields = [field.name for field in pb.ModelConfig.DESCRIPTOR.fields]
    return ShardInfo(
        model_fingerprint=message.model_fingerprint,
        placement_epoch=message.placement_epoch,
        config={name: getattr(message.config, name) for name in fields},
        layers=tuple(message.layers),
        experts=tuple(message.experts),
        max_tokens_per_request=message.limits.max_tokens_per_request,
        max_message_bytes=message.limits.max_message_bytes,
        max_queued_tokens=message.limits.max_queued_tokens,
        backend=message.backend,
        device=message.device,
        backend_reason=message.backend_reason,
        version=message.version,
    )


def message_bytes(tokens: int, hidden_size: int, top_k: int) -> int:
    """Upper bound of the length of a request or response for `tokens` tokens, in bytes."""
    request = tokens * (hidden_size * 2 + top_k * 8)
    response = tokens * hidden_size * 4
    return max(request, response) + ENVELOPE_BYTES


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _from_bytes(field: str, data: bytes, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    expected = shape[0] * shape[1] * dtype.itemsize
    if len(data) != expected:
        rows, columns = shape
        raise InvalidBatch(f"{field} has {len(data)} bytes; [{rows}, {columns}] {_name(dtype)} takes {expected}")
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidBatch(f"{field} is {value}; it must be from {low} to {high}")


def _check_dtype(field: str, code: pb.DType, accepted: tuple[torch.dtype, ...]) -> torch.dtype:
    dtype = _DTYPES.get(code)
    if dtype not in accepted or dtype is None:
        names = ", ".join(pb.DType.Name(_DTYPE_CODES[dtype]) for dtype in accepted)
        raise InvalidBatch(f"{field} is {_dtype_label(code)}; accepted: {names}")
    return dtype


def _dtype_label(code: pb.DType) -> str:
    return pb.DType.Name(code) if code in pb.DType.values() else str(code)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
