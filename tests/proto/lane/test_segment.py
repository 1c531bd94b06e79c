"""Where tensors lie in shared memory, and requests that would reach outside of it."""

from typing import Any

import pytest
import torch

from expertd.proto import codec
from expertd.proto.base.errors import InvalidBatch
from expertd.proto.codec import ExecuteCall
from expertd.proto.lane.layout import Layout, lay_out
from tests.support.model.messages import ReceivedCall, SharedSegment, decode_call
from tests.support.model.requests import parse_request
from tests.support.serving import random_batch

FP8, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
WIDTH, TOP_K = 256, 4
BATCH = random_batch(3, WIDTH, experts=16, top_k=TOP_K)


def parts(layout: Layout) -> tuple[tuple[int, int], ...]:
    return tuple(
        (place.start, place.stop)
        for place in (layout.hidden, layout.hidden_scales, layout.expert_ids, layout.weights, layout.partials)
    )


def test_tensors_follow_one_another_in_a_segment_from_multiples_of_64() -> None:
    layout = lay_out(64, None, 3, WIDTH, TOP_K, FP8, FP32)
    assert parts(layout) == ((64, 832), (832, 856), (896, 944), (960, 1008), (1024, 4096))
    assert (layout.end, layout.gpu_end) == (4096, 0)
    assert parts(lay_out(0, None, 3, WIDTH, TOP_K, BF16, BF16))[1:3] == ((1536, 1536), (1536, 1584))


def test_beside_gpu_memory_a_segment_has_ids_and_weights_alone() -> None:
    layout = lay_out(64, 512, 3, WIDTH, TOP_K, FP8, BF16)
    assert parts(layout) == ((512, 1280), (1280, 1304), (64, 112), (128, 176), (1536, 3072))
    assert (layout.end, layout.gpu_end) == (176, 3072)
    assert parts(lay_out(0, 0, 1, 128, 1, FP8, FP32)) == ((0, 128), (256, 260), (0, 4), (64, 68), (512, 1024))


def call_of() -> ExecuteCall:
    return ExecuteCall(
        request_id=7,
        model_fingerprint="f00d",
        placement_epoch=1,
        layer=1,
        hidden=BATCH.hidden,
        scales=BATCH.scales,
        expert_ids=BATCH.expert_ids,
        weights=BATCH.weights,
        reply_dtype=FP32,
    )


def decoded(segment: SharedSegment | None, **offsets: int | None) -> ReceivedCall:
    fields: dict[str, Any] = {"segment_offset": 0} | offsets
    message = codec.encode_call(call_of(), **fields)
    return decode_call(parse_request(message), WIDTH, TOP_K, 100, segment)


def test_a_call_is_read_from_both_memories_and_its_partials_have_their_place() -> None:
    memory, gpu = bytearray(4096), torch.zeros(8192, dtype=torch.uint8)
    layout, call = lay_out(128, 1024, 3, WIDTH, TOP_K, FP8, FP32), call_of()
    assert call.scales is not None
    memory[layout.expert_ids] = call.expert_ids.numpy().tobytes()
    memory[layout.weights] = call.weights.numpy().tobytes()
    gpu[layout.hidden] = call.hidden.view(-1).view(torch.uint8)
    gpu[layout.hidden_scales] = call.scales.view(-1).view(torch.uint8)
    read = decoded(SharedSegment(memoryview(memory), gpu), segment_offset=128, gpu_offset=1024)
    assert read.scales is not None
    assert torch.equal(read.hidden.view(torch.uint8), call.hidden.view(torch.uint8))
    assert torch.equal(read.scales, call.scales)
    assert torch.equal(read.expert_ids, call.expert_ids)
    assert torch.equal(read.weights, call.weights)
    assert read.reply_into is not None
    read.reply_into.fill_(1.5)
    assert torch.equal(gpu[layout.partials].view(FP32), torch.full((3 * WIDTH,), 1.5))
    assert int(gpu[layout.partials.stop :].sum()) == 0
    memory[layout.weights] = bytes(48)
    assert torch.equal(read.weights, call.weights), "what is checked is a copy"


MEMORY = memoryview(bytearray(4096))
GPU = torch.zeros(8192, dtype=torch.uint8)
BAD: dict[str, tuple[SharedSegment | None, dict[str, Any], str]] = {
    "past the end": (
        SharedSegment(MEMORY, GPU),
        {"gpu_offset": 4352},
        "gpu_offset is 4352 and the call's tensors end at byte 8448; the GPU memory has 8192",
    ),
    "far beyond": (SharedSegment(MEMORY, GPU), {"gpu_offset": 2**64 - 256}, "end at byte 18446744073709555456"),
    "unaligned": (SharedSegment(MEMORY, GPU), {"gpu_offset": 64}, "gpu_offset is 64; it must be a multiple of 256"),
    "ids past the end of the segment": (
        SharedSegment(MEMORY, GPU),
        {"gpu_offset": 0, "segment_offset": 4032},
        "segment_offset is 4032 and the call's tensors end at byte 4144; the segment has 4096",
    ),
    "no GPU memory": (SharedSegment(MEMORY), {"gpu_offset": 0}, "no GPU memory was handed over with the segment"),
    "no segment_offset": (
        SharedSegment(MEMORY, GPU),
        {"gpu_offset": 0, "segment_offset": None},
        "segment_offset is missing",
    ),
    "over gRPC": (None, {"gpu_offset": 256, "segment_offset": None}, "gpu_offset is 256; there is no segment"),
}


@pytest.mark.parametrize("name", BAD)
def test_requests_that_reach_outside_are_refused(name: str) -> None:
    segment, offsets, complaint = BAD[name]
    with pytest.raises(InvalidBatch, match=complaint):
        decoded(segment, **offsets)
    if segment is not None:
        assert decoded(SharedSegment(MEMORY, GPU), gpu_offset=4096).reply_into is not None
