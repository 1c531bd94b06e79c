"""The hand-written messages against the generated classes: the same bytes out, the same fields in, whatever comes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.proto import codec
from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import InvalidBatch, ServerFault
from expertd.proto.codec import ExecuteCall, ExecuteResult, StageTimings, wire
from expertd.proto.codec.schema import REQUEST, RESPONSE
from tests.support.model.messages import decode_call, encode_result
from tests.support.model.requests import RawRequest, parse_request

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
requests = st.builds(
    pb.ExecuteRequest,
    request_id=uint64,
    model_fingerprint=st.text(max_size=20),
    placement_epoch=st.none() | uint64,
    layer=uint32,
    num_tokens=uint32,
    top_k=uint32,
    hidden_dtype=st.integers(0, 3),
    reply_dtype=st.integers(0, 3),
    hidden=st.binary(max_size=300),
    hidden_scales=st.binary(max_size=20),
    expert_ids=st.binary(max_size=20),
    weights=st.binary(max_size=20),
    timeout_us=uint64,
    segment_offset=st.none() | uint64,
    cancels=st.none() | uint64,
    sums_offset=st.none() | uint64,
    fields_checksum=st.none() | uint32,
    tensors_checksum=st.none() | uint32,
)
responses = st.builds(
    pb.ExecuteResponse,
    request_id=uint64,
    error=st.none() | st.builds(pb.Error, code=uint32, message=st.text(max_size=9)),
    partials_dtype=st.integers(0, 3),
    partials=st.binary(max_size=300),
    receipt_experts=st.lists(uint32, max_size=5),
    receipt_pairs=st.lists(uint32, max_size=5),
    timings=st.none() | st.builds(pb.Timings, decode_ns=uint64, compute_ns=uint64),
)


def assert_read_alike(raw: RawRequest, message: pb.ExecuteRequest) -> None:
    for field in message.DESCRIPTOR.fields:
        ours: Any = getattr(raw, field.name)
        theirs = getattr(message, field.name)
        if field.name in ("placement_epoch", "segment_offset", "cancels", "gpu_offset", "sums_offset"):
            assert ours == (theirs if message.HasField(field.name) else None)
        elif field.name in ("fields_checksum", "tensors_checksum"):
            assert ours == (theirs.to_bytes(4, "little") if message.HasField(field.name) else None)
        elif isinstance(theirs, str):
            assert bytes(ours) == theirs.encode()
        else:
            assert ours == theirs


def fields_of(data: bytes) -> list[bytes]:
    """The serialized fields, one by one."""
    pieces, end = [], len(data)
    for number, kind, value in reversed(list(wire.read_fields(memoryview(data), len(data)))):
        size = len(wire.varint(value)) if isinstance(value, int) else len(value)
        size += len(wire.varint(number << 3 | kind)) + (len(wire.varint(size)) if kind == wire.BYTES else 0)
        pieces.append(data[end - size : end])
        end -= size
    return pieces


@given(message=requests)
def test_requests_are_read_as_the_generated_class_reads_them(message: pb.ExecuteRequest) -> None:
    assert_read_alike(parse_request(message.SerializeToString()), message)


@given(message=requests, data=st.data())
def test_any_field_order_unknown_fields_and_repeated_fields_are_understood(
    message: pb.ExecuteRequest, data: st.DataObject
) -> None:
    unknown = [
        wire.tag(1000, wire.VARINT) + b"\x07",
        wire.tag(77, wire.BYTES) + b"\x03abc",
        wire.tag(78, wire.FIXED32) + b"1234",
        wire.tag(79, wire.FIXED64) + b"12345678",
        wire.tag(9, wire.VARINT) + b"\x05",  # `hidden` with the wire type of a number: unknown too
    ]
    pieces = data.draw(st.permutations(fields_of(message.SerializeToString()) + unknown))
    mixed = REQUEST.write({"layer": 6}, begin=REQUEST.write({"layer": 5}, begin=b"".join(pieces)))
    raw = parse_request(mixed)
    assert_read_alike(raw, pb.ExecuteRequest.FromString(mixed))
    assert raw.layer == 6


@given(message=responses)
def test_responses_are_read_as_the_generated_class_reads_them(message: pb.ExecuteResponse) -> None:
    raw = codec.parse_response(message.SerializeToString())
    assert raw.request_id == message.request_id
    assert raw.partials_dtype == message.partials_dtype
    assert raw.partials == message.partials
    assert list(raw.receipt_experts) == list(message.receipt_experts)
    assert list(raw.receipt_pairs) == list(message.receipt_pairs)
    assert (raw.error is not None) == message.HasField("error")
    if raw.error is not None:
        assert pb.Error.FromString(bytes(raw.error)) == message.error
    assert pb.Timings.FromString(bytes(raw.timings)) == message.timings


def test_receipts_are_read_unpacked_too() -> None:
    experts, pairs = wire.tag(5, wire.VARINT), wire.tag(6, wire.VARINT)
    unpacked = b"".join(experts + wire.varint(expert) + pairs + b"\x02" for expert in (3, 9))
    raw = codec.parse_response(RESPONSE.write({"receipt_experts": (300, 4)}, begin=unpacked))
    assert (raw.receipt_experts, raw.receipt_pairs) == ([3, 9, 300, 4], [2, 2])


@given(
    request_id=uint64,
    epoch=st.none() | uint64,
    layer=uint32,
    tokens=st.integers(1, 9),
    quantized=st.booleans(),
    timeout=st.none() | st.floats(1e-6, 1e6),
)
def test_calls_are_written_byte_for_byte_like_the_generated_class(
    request_id: int, epoch: int | None, layer: int, tokens: int, quantized: bool, timeout: float | None
) -> None:
    hidden = torch.randn(tokens, 128)
    call = ExecuteCall(
        request_id=request_id,
        model_fingerprint="abc",
        placement_epoch=epoch,
        layer=layer,
        hidden=hidden.to(torch.float8_e4m3fn) if quantized else hidden.bfloat16(),
        scales=torch.rand(tokens, 1) if quantized else None,
        expert_ids=torch.randint(-1, 256, (tokens, 2), dtype=torch.int32),
        weights=torch.rand(tokens, 2),
        reply_dtype=torch.float32,
        timeout=timeout,
    )
    data = codec.encode_call(call)
    assert pb.ExecuteRequest.FromString(data).SerializeToString(deterministic=True) == data


@given(request_id=uint64)
def test_cancellations_are_written_byte_for_byte_like_the_generated_class(request_id: int) -> None:
    message = pb.ExecuteRequest(request_id=codec.CANCELLATION_ID, cancels=request_id)
    assert codec.encode_cancellation(request_id) == message.SerializeToString(deterministic=True)


@given(receipt=st.dictionaries(uint32, uint32, max_size=40), request_id=uint64, tokens=st.integers(1, 9))
def test_results_are_written_byte_for_byte_like_the_generated_class(
    receipt: dict[int, int], request_id: int, tokens: int
) -> None:
    timings = StageTimings(decode=0.0, queue=1.5, copy_in=1e-9, compute=3.0, copy_out=0.0)
    data = encode_result(ExecuteResult(request_id, torch.randn(tokens, 128), receipt, timings))
    assert pb.ExecuteResponse.FromString(data).SerializeToString(deterministic=True) == data


@given(message=requests, data=st.data())
def test_truncated_requests_are_refused_exactly_when_the_generated_class_refuses_them(
    message: pb.ExecuteRequest, data: st.DataObject
) -> None:
    whole = message.SerializeToString()
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    try:
        expected = pb.ExecuteRequest.FromString(cut)
    except Exception:
        # Those that begin with their checksum were altered.
        with pytest.raises((InvalidBatch, ServerFault), match=r"bytes received are no expertd\.v1\.ExecuteRequest"):
            parse_request(cut)
    else:
        assert_read_alike(parse_request(cut), expected)


@settings(max_examples=500)
@given(garbage=st.binary(max_size=60))
def test_garbage_is_read_like_the_generated_class_or_refused(garbage: bytes) -> None:
    try:
        raw = parse_request(garbage)
        codec.parse_response(garbage)
    except (InvalidBatch, ServerFault):
        return
    try:
        message = pb.ExecuteRequest.FromString(garbage)
    except Exception:
        return  # the generated class also refuses text that is not UTF-8; here the fingerprint check does
    assert raw.request_id == message.request_id
    assert raw.hidden == message.hidden


def test_reading_and_writing_copy_no_tensor() -> None:
    call = ExecuteCall(
        1,
        "abc",
        None,
        3,
        torch.randn(4, 128).bfloat16(),
        None,
        torch.zeros(4, 2, dtype=torch.int32),
        torch.rand(4, 2),
        torch.float32,
    )
    data = codec.encode_call(call)
    start = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    back = decode_call(parse_request(data), 128, 2, 4)
    for tensor in (back.hidden, back.expert_ids, back.weights):
        assert start <= tensor.data_ptr() < start + len(data)
