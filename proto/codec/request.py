"""A call as both ends see it, and the ExecuteRequest that it travels as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.proto.base.errors import InvalidBatch
from expertd.proto.codec.raw import EMPTY, RawRequest, check_is_request
from expertd.proto.codec.schema import REQUEST
from expertd.proto.codec.segment import tensors_in
from expertd.proto.codec.tensors import (
    DTYPE_CODES,
    HIDDEN_DTYPES,
    REPLY_DTYPES,
    Bytes,
    buffer,
    check_dtype,
    from_bytes,
)
from expertd.proto.lane.layout import QUANTIZATION_BLOCK, SharedSegment, lay_out


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
    """[T, k] int32 global expert ids, -1 where it names none of this server."""
    weights: Tensor
    """[T, k] float32."""
    reply_dtype: torch.dtype
    timeout: float | None = None
    """Seconds after which the server need not compute it any more."""
    traceparent: str = ""
    """The caller's span (W3C Trace Context); empty when the call is not traced."""
    reply_into: Tensor | None = None
    """[T, H] of `reply_dtype` in shared memory, where the partials belong; None: in the reply."""


def encode_call(call: ExecuteCall, segment_offset: int | None = None, gpu_offset: int | None = None) -> bytes:
    """The ExecuteRequest of `call`; with offsets, one whose tensors lie in a shared segment and in GPU memory."""
    hidden = scales = ids = weights = EMPTY
    if segment_offset is None:
        hidden, ids, weights = map(buffer, (call.hidden, call.expert_ids, call.weights))
        scales = EMPTY if call.scales is None else buffer(call.scales)
    return REQUEST.write(
        {
            "request_id": call.request_id,
            "model_fingerprint": call.model_fingerprint.encode(),
            "placement_epoch": call.placement_epoch,
            "layer": call.layer,
            "num_tokens": call.hidden.shape[0],
            "top_k": call.expert_ids.shape[1],
            "hidden_dtype": DTYPE_CODES[call.hidden.dtype],
            "reply_dtype": DTYPE_CODES[call.reply_dtype],
            "hidden": hidden,
            "hidden_scales": scales,
            "expert_ids": ids,
            "weights": weights,
            "timeout_us": None if call.timeout is None else max(1, int(call.timeout * 1e6)),
            "segment_offset": segment_offset,
            "traceparent": call.traceparent.encode("ascii"),
            "gpu_offset": gpu_offset,
        }
    )


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
    hidden_dtype = check_dtype("hidden_dtype", message.hidden_dtype, HIDDEN_DTYPES)
    reply_dtype = check_dtype("reply_dtype", message.reply_dtype, REPLY_DTYPES)
    parts: Sequence[Bytes] = (message.hidden, message.hidden_scales, message.expert_ids, message.weights)
    partials: Bytes | None = None
    if segment is not None:
        offsets = message.segment_offset or 0, message.gpu_offset
        layout = lay_out(*offsets, tokens, width, top_k, hidden_dtype, reply_dtype)
        *parts, partials = tensors_in(message, segment, layout)
    elif message.segment_offset is not None or message.gpu_offset is not None:
        name = "gpu_offset" if message.segment_offset is None else "segment_offset"
        raise InvalidBatch(f"{name} is {getattr(message, name)}; there is no segment: send the tensors")
    hidden, hidden_scales, expert_ids, weights = parts
    quantized = hidden_dtype == torch.float8_e4m3fn
    scales_shape = (tokens if quantized else 0, width // QUANTIZATION_BLOCK)
    scales = from_bytes("hidden_scales", hidden_scales, torch.float32, scales_shape)
    return ExecuteCall(
        request_id=message.request_id,
        model_fingerprint=str(message.model_fingerprint, "utf-8", "surrogateescape"),
        placement_epoch=message.placement_epoch,
        layer=message.layer,
        hidden=from_bytes("hidden", hidden, hidden_dtype, (tokens, width)),
        scales=scales if quantized else None,
        expert_ids=from_bytes("expert_ids", expert_ids, torch.int32, (tokens, top_k)),
        weights=from_bytes("weights", weights, torch.float32, (tokens, top_k)),
        reply_dtype=reply_dtype,
        timeout=message.timeout_us / 1e6 if message.timeout_us else None,
        traceparent=str(message.traceparent, "ascii", "replace"),
        reply_into=None if partials is None else from_bytes("partials", partials, reply_dtype, (tokens, width)),
    )


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidBatch(f"{field} is {value}; it must be from {low} to {high}")
