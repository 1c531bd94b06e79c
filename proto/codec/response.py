"""A result as both ends see it, and the ExecuteResponse that it travels as."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import ExpertdError, InvalidBatch, ServerFault, error_from_status
from expertd.proto.codec.checksums import fixed32, sums_checksum
from expertd.proto.codec.raw import RawResponse
from expertd.proto.codec.schema import RESPONSE
from expertd.proto.codec.tensors import check_dtype, sums_from_bytes

PUSHBACK = "grpc-retry-pushback-ms"
"""Trailing metadata of a refused unary call: milliseconds until the server expects to have room."""


class StageTimings(NamedTuple):
    """Seconds that one request spent in each stage of a server."""

    decode: float = 0.0
    queue: float = 0.0
    """In which nothing was done for it: waiting for the device, and between its stages."""
    copy_in: float = 0.0
    compute: float = 0.0
    copy_out: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True, slots=True)
class ExecuteResult:
    """Partial sums of one call, with the receipt for what they contain."""

    request_id: int
    partials: Tensor
    """[T, H] of the call's reply dtype, float8_e4m3fn with `scales`."""
    receipt: Mapping[int, int]
    """Computed (token, expert) pairs by global expert id; experts without pairs are absent."""
    timings: StageTimings
    scales: Tensor | None = None
    """[T, H/128] float32."""


_TIMES = attrgetter(*(f"{stage}_ns" for stage in StageTimings._fields))


def encode_error(request_id: int, error: ExpertdError) -> bytes:
    """The ExecuteResponse that refuses request `request_id` of a stream."""
    code: int = error.code.value[0]
    delay = 0 if error.retry_after is None else whole_milliseconds(error.retry_after)
    refusal = pb.Error(code=code, message=str(error), retry_after_ms=delay)
    return RESPONSE.write({"request_id": request_id, "error": refusal.SerializeToString()})


def decode_result(
    message: RawResponse,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    shared: Tensor | None = None,
    *,
    checked: bool = False,
) -> ExecuteResult:
    """Read a response that must hold partials [tokens, width] of `dtype`, or leave them in `shared` [n] uint8.

    Its checksum is of those in `shared` too where the request was `checked`, unless they are on a GPU.
    Raises the error that the response carries, or `ServerFault` when it is not what was asked for.
    """
    if message.error is not None:
        raise read_error(message.error)
    covered = shared.numpy().data if checked and shared is not None and not shared.is_cuda else message.partials
    if message.checksum != fixed32(sums_checksum(message.request_id, covered)):
        raise ServerFault("the response was altered on its way: its checksum does not match its partials")
    try:
        check_dtype("partials_dtype", message.partials_dtype, (dtype,))
        data = message.partials if shared is None else shared
        partials, scales = sums_from_bytes("partials", data, dtype, (tokens, width))
        timings = _read_timings(message.timings)
        receipt = dict(zip(message.receipt_experts, message.receipt_pairs, strict=True))
    except (InvalidBatch, ValueError, DecodeError) as error:
        raise ServerFault(f"malformed response: {error}") from None
    return ExecuteResult(message.request_id, partials, receipt, timings, scales)


def read_error(message: memoryview) -> ExpertdError:
    try:
        error = pb.Error.FromString(bytes(message))
    except DecodeError as malformed:
        return ServerFault(f"malformed response: {malformed}")
    return error_from_status(error.code, error.message, error.retry_after_ms / 1e3 or None)


def whole_milliseconds(seconds: float) -> int:
    """Rounded up, so that no delay becomes none."""
    return math.ceil(seconds * 1e3)


def _read_timings(message: memoryview) -> StageTimings:
    return StageTimings(*(spent / 1e9 for spent in _TIMES(pb.Timings.FromString(bytes(message)))))
