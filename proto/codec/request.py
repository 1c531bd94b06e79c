"""A call as both ends see it, and the ExecuteRequest that it travels as."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.proto.codec.checksums import bytes_checksum, fields_checksum, fixed32
from expertd.proto.codec.raw import EMPTY
from expertd.proto.codec.schema import REQUEST
from expertd.proto.codec.tensors import DTYPE_CODES, buffer


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


def encode_call(
    call: ExecuteCall,
    segment_offset: int | None = None,
    gpu_offset: int | None = None,
    *,
    checked: bool = False,
    written: int | None = None,
) -> bytes:
    """The ExecuteRequest of `call`; with offsets, one whose tensors lie in a shared segment and in GPU memory.

    It has checksums if `checked`; `written` is the checksum of tensors that lie in a segment.
    """
    hidden = scales = ids = weights = EMPTY
    if segment_offset is None:
        hidden, ids, weights = map(buffer, (call.hidden, call.expert_ids, call.weights))
        scales = EMPTY if call.scales is None else buffer(call.scales)
    fields = {
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
        "sums_offset": None,
    }
    if not checked:
        return REQUEST.write(fields)
    tensors = bytes_checksum((hidden, scales, ids, weights)) if written is None else written
    # First, so that no length that is altered hides it.
    begin = REQUEST.write({"fields_checksum": fixed32(fields_checksum(fields, tensors))})
    return REQUEST.write(fields | {"tensors_checksum": fixed32(tensors)}, begin)
