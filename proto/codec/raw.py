"""Responses, field by field and unchecked, and the message that cancels a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertd.proto.base.errors import ServerFault
from expertd.proto.codec.schema import REQUEST, RESPONSE
from expertd.proto.codec.wire import MalformedMessage

EMPTY = memoryview(b"")
CANCELLATION_ID = 2**64 - 1
"""The request_id of messages that cancel other requests; coordinators number theirs from 1."""


@dataclass(frozen=True, slots=True)
class RawResponse:
    """The fields of an ExecuteResponse; the partials are a view of the received bytes."""

    request_id: int = 0
    error: memoryview | None = None
    partials_dtype: int = 0
    partials: memoryview = EMPTY
    receipt_experts: Sequence[int] = ()
    receipt_pairs: Sequence[int] = ()
    timings: memoryview = EMPTY
    checksum: memoryview = EMPTY


def parse_response(data: bytes | bytearray) -> RawResponse:
    """Read a serialized ExecuteResponse; bytes that are none raise `ServerFault`."""
    try:
        return RawResponse(**RESPONSE.read(data))  # type: ignore[arg-type]
    except MalformedMessage as error:
        raise ServerFault(f"malformed response of {len(data)} bytes: {error}") from None


def encode_cancellation(request_id: int) -> bytes:
    """The message that cancels request `request_id` of the same stream."""
    return REQUEST.write({"request_id": CANCELLATION_ID, "cancels": request_id})
