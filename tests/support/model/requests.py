"""Requests, field by field and unchecked, as a server reads them."""

from __future__ import annotations

from dataclasses import dataclass

from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import InvalidBatch, ServerFault
from expertd.proto.codec import EMPTY
from expertd.proto.codec.schema import REQUEST
from expertd.proto.codec.wire import MalformedMessage

_CHECKED = REQUEST.write({"fields_checksum": bytes(4)})[:-4]
"""How requests begin whose first field it is."""


@dataclass(frozen=True, slots=True)
class RawRequest:
    """The fields of an ExecuteRequest; tensors are views of the received bytes, or of a segment's."""

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
    segment_offset: int | None = None
    traceparent: memoryview = EMPTY
    cancels: int | None = None
    gpu_offset: int | None = None
    fields_checksum: memoryview | None = None
    tensors_checksum: memoryview | None = None
    sums_offset: int | None = None


def parse_request(data: bytes) -> RawRequest:
    """Read a serialized ExecuteRequest; bytes that are none raise `InvalidBatch`, or `ServerFault` if they were."""
    try:
        return RawRequest(**REQUEST.read(data))  # type: ignore[arg-type]
    except MalformedMessage as error:
        text = f"the {len(data)} bytes received are no {pb.ExecuteRequest.DESCRIPTOR.full_name}: {error}"
        if data.startswith(_CHECKED):
            raise ServerFault(f"{text}; they begin with a checksum: the request was altered on its way") from None
        raise InvalidBatch(text) from None


def encode_request(request: RawRequest) -> bytes:
    """The ExecuteRequest that `parse_request` reads as `request`."""
    return REQUEST.write({name: getattr(request, name) for name in REQUEST.names})


def not_a_request(cancels: int) -> InvalidBatch:
    """What is wrong with a message that cancels request `cancels` where a request is wanted."""
    return InvalidBatch(f"cancels is {cancels}; it is for requests of a stream: end this call instead")
