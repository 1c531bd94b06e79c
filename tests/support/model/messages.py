"""What requests and responses a server reads and writes, as the engine's are compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import InvalidBatch, ServerFault
from expertd.proto.codec import ExecuteCall, ExecuteResult, StageTimings
from expertd.proto.codec.checksums import bytes_checksum, fields_checksum, fixed32, sums_checksum
from expertd.proto.codec.schema import RESPONSE
from expertd.proto.codec.tensors import (
    DTYPE_CODES,
    HIDDEN_DTYPES,
    REPLY_DTYPES,
    Bytes,
    buffer,
    check_dtype,
    from_bytes,
    sums_from_bytes,
)
from expertd.proto.lane.layout import ALIGNMENT, QUANTIZATION_BLOCK, Layout, lay_out
from tests.support.model.requests import RawRequest, not_a_request


@dataclass(frozen=True, slots=True)
class SharedSegment:
    """What a caller shares with a server."""

    memory: memoryview
    gpu: Tensor | None = None
    """[n] uint8 on the server's GPU, where the caller handed over such memory as well."""


@dataclass(frozen=True, slots=True)
class ReceivedCall(ExecuteCall):
    """A call as a server sees it."""

    reply_into: Tensor | None = None
    """[T, H] of `reply_dtype` in shared memory, where the partials belong; None: in the reply."""


def decode_call(
    message: RawRequest, width: int, max_top_k: int, max_tokens: int, segment: SharedSegment | None = None
) -> ReceivedCall:
    """Read a request of at most `max_tokens` tokens for a model of hidden size `width` and top-k `max_top_k`.

    Its tensors are in `segment` where one is given. Raises `InvalidBatch` when a size or dtype is outside the contract.
    """
    if message.cancels is not None:
        raise not_a_request(message.cancels)
    _check_fields(message)
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
    else:
        for name in ("segment_offset", "gpu_offset", "sums_offset"):
            if getattr(message, name) is not None:
                raise InvalidBatch(f"{name} is {getattr(message, name)}; there is no segment: send the tensors")
    hidden, hidden_scales, expert_ids, weights = parts
    _check_bytes(message, parts)
    quantized = hidden_dtype == torch.float8_e4m3fn
    scales_shape = (tokens if quantized else 0, width // QUANTIZATION_BLOCK)
    scales = from_bytes("hidden_scales", hidden_scales, torch.float32, scales_shape)
    return ReceivedCall(
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
        reply_into=None if partials is None else sums_from_bytes("partials", partials, reply_dtype, (tokens, width))[0],
    )


def _check_fields(message: RawRequest) -> None:
    if message.fields_checksum is not None:
        tensors = message.tensors_checksum
        fields = {name: getattr(message, name) for name in RawRequest.__slots__}
        found = fields_checksum(fields, None if tensors is None else int.from_bytes(tensors, "little"))
        _compare("fields", message.fields_checksum, found)


def _check_bytes(message: RawRequest, parts: Sequence[Bytes]) -> None:
    """Of the tensors, as far as they are not on a GPU."""
    if message.tensors_checksum is not None:
        found = bytes_checksum(part for part in parts if isinstance(part, memoryview))
        _compare("tensors", message.tensors_checksum, found)


def _compare(what: str, sent: memoryview, found: int) -> None:
    if sent != fixed32(found):
        raise ServerFault(
            f"{what}_checksum is 0x{int.from_bytes(sent, 'little'):08x}; the {what} that came have 0x{found:08x}:"
            " the request was altered on its way"
        )


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidBatch(f"{field} is {value}; it must be from {low} to {high}")


def tensors_in(message: RawRequest, segment: SharedSegment, layout: Layout) -> tuple[Bytes, ...]:
    """Hidden states, scales, ids and weights from `segment`, which the caller can change at any time, and the partials.

    What is checked is copied first: ids, weights, and scales that are not on a GPU. Everything else is read in place:
    every byte of it is a value, and a token's values reach no other token's result.
    """
    if message.segment_offset is None:
        raise InvalidBatch("segment_offset is missing; tensors of this connection lie in its segment")
    if message.hidden or message.hidden_scales or message.expert_ids or message.weights:
        raise InvalidBatch("hidden, hidden_scales, expert_ids and weights must be empty beside segment_offset")
    memory, gpu = segment.memory, segment.gpu
    sums_apart = message.sums_offset is not None
    end = layout.weights.stop if sums_apart else layout.end
    _check_end("segment_offset", message.segment_offset, end, len(memory))
    partials = _sums_apart(message, layout, len(memory)) if sums_apart else layout.partials
    ids, weights = (memoryview(bytes(memory[place])) for place in (layout.expert_ids, layout.weights))
    if not layout.on_gpu:
        scales = memoryview(bytes(memory[layout.hidden_scales]))
        return memory[layout.hidden], scales, ids, weights, memory[partials]
    if gpu is None:
        raise InvalidBatch(f"gpu_offset is {message.gpu_offset}; no GPU memory was handed over with the segment")
    _check_end("gpu_offset", message.gpu_offset, layout.gpu_end, len(gpu))
    return gpu[layout.hidden], gpu[layout.hidden_scales], ids, weights, gpu[layout.partials]


def _sums_apart(message: RawRequest, layout: Layout, size: int) -> slice:
    """Where the partials go that have a place of their own in a segment of `size` bytes."""
    offset = message.sums_offset
    assert offset is not None
    if message.gpu_offset is not None:
        raise InvalidBatch(f"sums_offset is {offset}; beside gpu_offset the partials are on the GPU")
    if offset % ALIGNMENT:
        raise InvalidBatch(f"sums_offset is {offset}; it must be a multiple of {ALIGNMENT}")
    end = offset + layout.partials.stop - layout.partials.start
    if end > size:
        raise InvalidBatch(f"sums_offset is {offset} and the partials end at byte {end}; the segment has {size}")
    return slice(offset, end)


def _check_end(field: str, offset: int | None, end: int, size: int) -> None:
    if end > size:
        what = "segment" if field == "segment_offset" else "GPU memory"
        raise InvalidBatch(f"{field} is {offset} and the call's tensors end at byte {end}; the {what} has {size}")


def encode_result(result: ExecuteResult) -> bytes:
    """The ExecuteResponse of `result`."""
    scales = b"" if result.scales is None else buffer(result.scales)
    partials = memoryview(b"".join((buffer(result.partials), scales)))
    return RESPONSE.write(
        {
            "request_id": result.request_id,
            "partials_dtype": DTYPE_CODES[result.partials.dtype],
            "partials": partials,
            "receipt_experts": tuple(result.receipt.keys()),
            "receipt_pairs": tuple(result.receipt.values()),
            "timings": _write_timings(result.timings),
            "checksum": fixed32(sums_checksum(result.request_id, partials)),
        }
    )


def _write_timings(timings: StageTimings) -> bytes:
    # The generated class is the faster one where there is nothing large.
    nanoseconds = {f"{stage}_ns": round(seconds * 1e9) for stage, seconds in zip(timings._fields, timings, strict=True)}
    return pb.Timings(**nanoseconds).SerializeToString()
