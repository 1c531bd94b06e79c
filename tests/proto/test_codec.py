"""Tensors to messages and back."""

from dataclasses import fields, replace
from typing import Any

import grpc
import pytest
import torch

from expertd.kernels.model.config import MoeConfig
from expertd.proto import codec
from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base import errors
from expertd.proto.base.errors import ExpertdError, InvalidBatch, Overloaded, ServerFault, error_from_status
from expertd.proto.codec import DeviceInfo, ExecuteCall, ExecuteResult, RawResponse, ShardInfo, StageTimings
from expertd.proto.codec.schema import REQUEST, RESPONSE, MessageSchema
from tests.support.model.messages import decode_call, encode_result
from tests.support.model.requests import RawRequest, encode_request, parse_request

WIDTH, TOP_K = 256, 4
NONE, ONE = pb.ExpertList(), pb.ExpertList(experts=[1])


def example_call(hidden_dtype: torch.dtype, tokens: int = 3) -> ExecuteCall:
    hidden = torch.randn(tokens, WIDTH).to(hidden_dtype)
    quantized = hidden_dtype == torch.float8_e4m3fn
    return ExecuteCall(
        request_id=2**63 + 5,
        model_fingerprint="abc",
        placement_epoch=17,
        layer=60,
        hidden=hidden,
        scales=torch.rand(tokens, WIDTH // 128) if quantized else None,
        expert_ids=torch.tensor([[0, 255, -1, 31]] * tokens, dtype=torch.int32),
        weights=torch.rand(tokens, TOP_K),
        reply_dtype=torch.bfloat16,
        timeout=1.5,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype
    assert torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


@pytest.mark.parametrize("hidden_dtype", codec.HIDDEN_DTYPES)
def test_a_call_survives_the_wire(hidden_dtype: torch.dtype) -> None:
    call = example_call(hidden_dtype)
    back = decode_call(parse_request(codec.encode_call(call)), WIDTH, TOP_K, max_tokens=3)
    for field in ("hidden", "expert_ids", "weights"):
        assert_same_bits(getattr(call, field), getattr(back, field))
    if call.scales is None:
        assert back.scales is None
    else:
        assert back.scales is not None
        assert_same_bits(call.scales, back.scales)
    tensors: dict[str, Any] = dict.fromkeys(("hidden", "scales", "expert_ids", "weights"))
    others = [field.name for field in fields(call) if field.name not in tensors]
    assert [getattr(call, name) for name in others] == [getattr(back, name) for name in others]


@pytest.mark.parametrize("hidden_dtype", codec.HIDDEN_DTYPES)
def test_a_request_that_was_read_is_written_as_it_was(hidden_dtype: torch.dtype) -> None:
    request = parse_request(codec.encode_call(example_call(hidden_dtype)))
    assert parse_request(encode_request(request)) == request
    moved = replace(request, hidden=codec.EMPTY, segment_offset=0, gpu_offset=256, cancels=3, placement_epoch=None)
    assert parse_request(encode_request(moved)) == moved


def test_a_call_of_views_is_sent_contiguously() -> None:
    call = example_call(torch.bfloat16)
    turned = replace(call, weights=call.weights.T.contiguous().T, hidden=torch.cat([call.hidden] * 2, 1)[:, :WIDTH])
    assert codec.encode_call(turned) == codec.encode_call(call)


def test_an_absent_placement_epoch_is_not_zero() -> None:
    call = replace(example_call(torch.bfloat16), placement_epoch=None, timeout=None)
    back = decode_call(parse_request(codec.encode_call(call)), WIDTH, TOP_K, max_tokens=3)
    assert back.placement_epoch is None
    assert back.timeout is None


@pytest.mark.parametrize("dtype", codec.REPLY_DTYPES)
def test_a_result_survives_the_wire(dtype: torch.dtype) -> None:
    timings = StageTimings(decode=1e-6, queue=2e-6, copy_in=0.0, compute=0.25, copy_out=3e-9)
    scales = torch.rand(3, WIDTH // 128) if dtype == torch.float8_e4m3fn else None
    result = ExecuteResult(9, torch.randn(3, WIDTH).to(dtype), {0: 3, 31: 2}, timings, scales)
    back = codec.decode_result(codec.parse_response(encode_result(result)), 3, WIDTH, dtype)
    assert_same_bits(result.partials, back.partials)
    assert (back.scales is None) == (scales is None)
    if scales is not None and back.scales is not None:
        assert_same_bits(scales, back.scales)
    assert (back.request_id, back.receipt, back.timings) == (9, {0: 3, 31: 2}, timings)
    assert back.timings.total == pytest.approx(0.250003003)


def test_a_result_of_another_size_or_dtype_is_a_fault_of_the_server() -> None:
    response = codec.parse_response(encode_result(ExecuteResult(9, torch.zeros(3, WIDTH), {}, StageTimings())))
    with pytest.raises(ServerFault, match=r"partials has 3072 bytes; \[4, 256\] float32 takes 4096"):
        codec.decode_result(response, 4, WIDTH, torch.float32)
    with pytest.raises(ServerFault, match="partials_dtype is DTYPE_FLOAT32; accepted: DTYPE_BFLOAT16"):
        codec.decode_result(response, 3, WIDTH, torch.bfloat16)
    response = replace(response, receipt_experts=(4,))
    with pytest.raises(ServerFault, match=r"malformed response: zip\(\) argument 2 is shorter"):
        codec.decode_result(response, 3, WIDTH, torch.float32)


@pytest.mark.parametrize("scales", [(3, 1), (3, 3), (0, 0)])
def test_an_fp8_result_without_all_its_scales_is_a_fault_of_the_server(scales: tuple[int, int]) -> None:
    dtype = torch.float8_e4m3fn
    result = ExecuteResult(9, torch.zeros(3, WIDTH).to(dtype), {}, StageTimings(), torch.ones(scales))
    length = 3 * WIDTH + 4 * scales[0] * scales[1]
    complaint = rf"partials has {length} bytes; \[3, 256\] float8_e4m3fn with scales \[3, 2\] float32 takes 792"
    with pytest.raises(ServerFault, match=complaint):
        codec.decode_result(codec.parse_response(encode_result(result)), 3, WIDTH, dtype)


@pytest.mark.parametrize("at", [0, 3 * WIDTH - 1, 3 * WIDTH, -1], ids=["first", "last", "first scale", "last scale"])
def test_the_checksum_covers_values_and_scales(at: int) -> None:
    dtype = torch.float8_e4m3fn
    result = ExecuteResult(9, torch.zeros(3, WIDTH).to(dtype), {}, StageTimings(), torch.ones(3, 2))
    response = codec.parse_response(encode_result(result))
    altered = bytearray(response.partials)
    altered[at] ^= 1
    with pytest.raises(ServerFault, match="its checksum does not match its partials"):
        codec.decode_result(replace(response, partials=memoryview(altered)), 3, WIDTH, dtype)


def test_a_refusal_is_raised_by_the_reader() -> None:
    with pytest.raises(Overloaded, match=r"^come back later$"):
        codec.decode_result(
            codec.parse_response(codec.encode_error(9, Overloaded("come back later"))), 3, WIDTH, torch.float32
        )


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(InvalidBatch, match=r"the 3 bytes received are no expertd\.v1\.ExecuteRequest"):
        parse_request(b"\xff\xff\xff")


def test_a_shard_survives_the_wire() -> None:
    config = MoeConfig(dense_layers=(5, 7)).fields
    owned = dict.fromkeys((3, 4), tuple(range(32)))
    shard = ShardInfo("abc", 17, config, owned, 4096, 1 << 20, 65536, 1 << 30, "torch", "cpu", "auto", "1", "z")
    shard = replace(shard, expert_digests=b"digests", has_manifest=True, instruction_set="avx2")
    shard = replace(
        shard,
        weight_dtype=torch.bfloat16,
        checkpoint_dtypes=(torch.bfloat16,),
        metrics_address="a:9",
        admin_address="a:8",
    )
    for experts in (owned, {3: (5,), 4: (0, 7), 9: ()}, {3: (), 4: (5,)}, {}):
        shard = replace(shard, experts=experts)
        message = codec.encode_shard(shard).SerializeToString()
        assert codec.decode_shard(codec.ShardResponse.FromString(message)) == shard
    several = DeviceInfo(0, "gpu", room=2, experts={3: (), 4: (5,)}), DeviceInfo(1, "gpu", lost=True, room=2)
    shard = replace(shard, experts={3: (1,), 4: (5,)}, devices=several)
    message = codec.encode_shard(shard).SerializeToString()
    assert codec.decode_shard(codec.ShardResponse.FromString(message)) == shard
    for served, stored, told in (
        (torch.float8_e4m3fn, (torch.float4_e2m1fn_x2,), "fp8 of mxfp4"),
        (torch.float8_e4m3fn, (torch.float8_e4m3fn, torch.bfloat16), "fp8 of bf16"),
        (torch.bfloat16, (torch.bfloat16,), "bf16"),
    ):
        answer = codec.encode_shard(replace(shard, weight_dtype=served, checkpoint_dtypes=stored))
        decoded = codec.decode_shard(codec.ShardResponse.FromString(answer.SerializeToString()))
        assert (decoded.checkpoint_dtypes, decoded.weights) == (stored, told)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"layer_experts": [NONE]}, "layer_experts has 1 lists; there are 2 layers"),
        ({"layers": [4, 3]}, r"layers are \[4, 3\]; they must ascend"),
        ({"experts": [1, 1]}, r"experts are \[1, 1\]; they must ascend"),
        ({"experts": [256]}, "experts hold 256; the model has 256"),
        ({"devices": [pb.Device(layer_experts=[NONE])]}, "device 0 tells of 1 layers; there are 2"),
        (
            {"devices": [pb.Device(number=5, layer_experts=[NONE, ONE])]},
            r"layer 4: device 5 has \[1\], .* not all owned",
        ),
    ],
)
def test_owned_experts_that_cannot_be_are_a_servers_fault(fields: dict[str, Any], complaint: str) -> None:
    told: dict[str, Any] = {"config": pb.ModelConfig(n_routed_experts=256), "layers": [3, 4], "experts": [0]} | fields
    with pytest.raises(errors.ServerFault, match=complaint):
        codec.decode_shard(pb.GetShardResponse(**told))


def test_every_error_has_a_status_of_its_own_and_comes_back_from_it() -> None:
    kinds = ExpertdError.__subclasses__()
    assert len({kind.code for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert type(error_from_status(kind.code, "x")) is kind
        assert type(error_from_status(kind.code.value[0], "x")) is kind


def test_statuses_outside_the_contract_become_faults_that_name_them() -> None:
    assert str(error_from_status(grpc.StatusCode.UNIMPLEMENTED, "no such method")) == "UNIMPLEMENTED: no such method"
    assert isinstance(error_from_status(99, "?"), errors.ServerFault)


@pytest.mark.parametrize(("tokens", "width", "top_k"), [(1, 128, 1), (4096, 7168, 8), (1, 7168, 8), (4096, 128, 8)])
def test_message_bytes_bounds_every_message(tokens: int, width: int, top_k: int) -> None:
    bound = codec.message_bytes(tokens, width, top_k)
    base = example_call(torch.bfloat16)
    for dtype in codec.HIDDEN_DTYPES:
        call = replace(
            base,
            hidden=torch.zeros(tokens, width).to(dtype),
            scales=torch.zeros(tokens, width // 128) if dtype == torch.float8_e4m3fn else None,
            expert_ids=torch.zeros(tokens, top_k, dtype=torch.int32),
            weights=torch.zeros(tokens, top_k),
        )
        assert len(codec.encode_call(call)) <= bound
    receipt = dict.fromkeys(range(256), 2**31)
    result = ExecuteResult(2**63, torch.zeros(tokens, width), receipt, StageTimings(1e3, 1e3, 1e3, 1e3, 1e3))
    assert len(encode_result(result)) <= bound


@pytest.mark.parametrize(("raw", "schema"), [(RawRequest, REQUEST), (RawResponse, RESPONSE)])
def test_raw_messages_have_the_contracts_fields_in_its_order(
    raw: type[RawRequest | RawResponse], schema: MessageSchema
) -> None:
    assert tuple(raw.__dataclass_fields__) == schema.names
