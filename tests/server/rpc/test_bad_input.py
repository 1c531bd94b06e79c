"""Requests that must be refused: the right status, a message with field, value and bound, and nothing computed."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
import torch

from expertd.kernels.numerics.backend import TokenBatch
from expertd.proto import codec
from expertd.proto.expert_shard_pb2 import ExecuteRequest as Request
from expertd.server.app import Server
from tests.support.serving import (
    call_for,
    execute_method,
    open_channel,
    random_batch,
    request_for,
    running_server,
    stream_method,
)

MAX_TOKENS = 32
OWNED = range(4, 12)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(small_model: Path) -> AsyncIterator[Server]:
    async with running_server(small_model, OWNED, max_tokens_per_request=MAX_TOKENS) as server:
        yield server


pytestmark = pytest.mark.asyncio(loop_scope="module")


def good_batch(tokens: int = 4) -> TokenBatch:
    """Tokens for experts 4..11 only."""
    batch = random_batch(tokens, hidden=256, experts=8, top_k=4)
    return replace(batch, expert_ids=torch.where(batch.expert_ids < 0, -1, batch.expert_ids + 4))


def request(server: Server, **changes: object) -> Request:
    return request_for(server, good_batch(), **changes)


def edited(server: Server, edit: Callable[[Request], object]) -> Request:
    message = request(server)
    edit(message)
    return message


def with_ids(server: Server, *row: int) -> Request:
    batch = good_batch()
    ids = batch.expert_ids.clone()
    ids[1] = torch.tensor(row)
    return request_for(server, replace(batch, expert_ids=ids))


def with_weight(server: Server, value: float) -> Request:
    weights = good_batch().weights.clone()
    weights[2, 1] = value
    return request(server, weights=weights)


def with_scale(server: Server, value: float) -> Request:
    scales = good_batch().scales
    assert scales is not None
    scales = scales.clone()
    scales[3, 1] = value
    return request(server, scales=scales)


CASES: dict[str, tuple[Callable[[Server], Request], grpc.StatusCode, str]] = {
    "hidden too short": (
        lambda s: edited(s, lambda m: setattr(m, "hidden", m.hidden[:-1])),
        INVALID,
        r"hidden has 1023 bytes; \[4, 256\] float8_e4m3fn takes 1024",
    ),
    "hidden too long": (
        lambda s: edited(s, lambda m: setattr(m, "hidden", m.hidden + b"\0")),
        INVALID,
        r"hidden has 1025 bytes",
    ),
    "no hidden": (lambda s: edited(s, lambda m: m.ClearField("hidden")), INVALID, r"hidden has 0 bytes"),
    "scales too short": (
        lambda s: edited(s, lambda m: setattr(m, "hidden_scales", m.hidden_scales[4:])),
        INVALID,
        r"hidden_scales has 28 bytes; \[4, 2\] float32 takes 32",
    ),
    "scales beside bfloat16": (
        lambda s: edited(s, lambda m: setattr(m, "hidden_dtype", 2)),
        INVALID,
        r"hidden_scales has 32 bytes; \[0, 2\] float32 takes 0",
    ),
    "ids of another size": (
        lambda s: edited(s, lambda m: setattr(m, "expert_ids", m.expert_ids[:-2])),
        INVALID,
        r"expert_ids has 62 bytes; \[4, 4\] int32 takes 64",
    ),
    "weights of another size": (
        lambda s: edited(s, lambda m: setattr(m, "weights", m.weights * 2)),
        INVALID,
        r"weights has 128 bytes; \[4, 4\] float32 takes 64",
    ),
    "no tokens": (
        lambda s: edited(s, lambda m: setattr(m, "num_tokens", 0)),
        INVALID,
        r"num_tokens is 0; it must be from 1 to 32",
    ),
    "too many tokens": (
        lambda s: request_for(s, good_batch(MAX_TOKENS + 1)),
        INVALID,
        r"num_tokens is 33; it must be from 1 to 32",
    ),
    "absurdly many tokens": (
        lambda s: edited(s, lambda m: setattr(m, "num_tokens", 2**32 - 1)),
        INVALID,
        r"num_tokens is 4294967295",
    ),
    "no experts a token": (
        lambda s: edited(s, lambda m: setattr(m, "top_k", 0)),
        INVALID,
        r"top_k is 0; it must be from 1 to 4",
    ),
    "more experts a token than the model": (
        lambda s: edited(s, lambda m: setattr(m, "top_k", 5)),
        INVALID,
        r"top_k is 5; it must be from 1 to 4",
    ),
    "unset dtype": (
        lambda s: edited(s, lambda m: m.ClearField("hidden_dtype")),
        INVALID,
        r"hidden_dtype is DTYPE_UNSPECIFIED; accepted: DTYPE_FLOAT8_E4M3FN, DTYPE_BFLOAT16",
    ),
    "hidden in float32": (
        lambda s: edited(s, lambda m: setattr(m, "hidden_dtype", 3)),
        INVALID,
        r"hidden_dtype is DTYPE_FLOAT32; accepted",
    ),
    "unknown dtype": (
        lambda s: edited(s, lambda m: setattr(m, "hidden_dtype", 99)),
        INVALID,
        r"hidden_dtype is 99; accepted",
    ),
    "no reply dtype": (
        lambda s: edited(s, lambda m: setattr(m, "reply_dtype", 0)),
        INVALID,
        r"reply_dtype is DTYPE_UNSPECIFIED; accepted: DTYPE_FLOAT32, DTYPE_BFLOAT16, DTYPE_FLOAT8_E4M3FN",
    ),
    "unknown layer": (lambda s: request(s, layer=99), NOT_FOUND, r"layer is 99; this server owns layers 1-2"),
    "dense layer": (lambda s: request(s, layer=0), NOT_FOUND, r"layer is 0; this server owns layers 1-2"),
    "expert of another server": (
        lambda s: with_ids(s, 4, 5, 12, -1),
        NOT_FOUND,
        r"expert_ids\[1, 2\] is 12; this server owns experts 4-11",
    ),
    "expert beyond the model": (
        lambda s: with_ids(s, 4, 16, 5, 6),
        INVALID,
        r"expert_ids\[1, 1\] is 16; it must be -1 or from 0 to 15",
    ),
    "negative expert": (
        lambda s: with_ids(s, 4, 5, 6, -2),
        INVALID,
        r"expert_ids\[1, 3\] is -2; it must be -1 or from 0 to 15",
    ),
    "largest negative expert": (
        lambda s: with_ids(s, -(2**31), 5, 6, 7),
        INVALID,
        r"expert_ids\[1, 0\] is -2147483648",
    ),
    "the same expert twice": (
        lambda s: with_ids(s, 9, 4, 9, -1),
        INVALID,
        r"expert_ids\[1\] is \[9, 4, 9, -1\]; a token may name an expert at most once",
    ),
    "NaN weight": (lambda s: with_weight(s, float("nan")), INVALID, r"weights\[2, 1\] is nan; it must be finite"),
    "infinite weight": (lambda s: with_weight(s, float("inf")), INVALID, r"weights\[2, 1\] is inf"),
    "NaN scale": (lambda s: with_scale(s, float("nan")), INVALID, r"hidden_scales\[3, 1\] is nan; it must be finite"),
    "infinite scale": (lambda s: with_scale(s, float("-inf")), INVALID, r"hidden_scales\[3, 1\] is -inf"),
    "another model": (
        lambda s: request(s, model_fingerprint="f00d"),
        grpc.StatusCode.FAILED_PRECONDITION,
        r"model_fingerprint is 'f00d'; this server holds '[0-9a-f]{64}'",
    ),
    "no model": (
        lambda s: request(s, model_fingerprint=""),
        grpc.StatusCode.FAILED_PRECONDITION,
        r"model_fingerprint is ''; this server holds",
    ),
    "a placement of the past": (
        lambda s: request(s, placement_epoch=1),
        grpc.StatusCode.ABORTED,
        r"placement_epoch is 1; the current one is \d+",
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_refused_by_execute_and_by_the_stream_alike(server: Server, name: str) -> None:
    make, code, message = CASES[name]
    batches_before = server.metrics.registry.get_sample_value("expertd_batch_tokens_count")
    async with open_channel(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=message) as refused:
            await execute_method(channel)(make(server))
        assert refused.value.code() == code

        stream = stream_method(channel)()
        await stream.write(make(server))
        answer = await stream.read()
        assert answer.request_id == 7
        assert (answer.error.code, answer.error.message) == (code.value[0], refused.value.details())
        assert not answer.partials

        assert server.metrics.registry.get_sample_value("expertd_batch_tokens_count") == batches_before
        await stream.write(request(server))
        assert (await stream.read()).partials, "the same stream still serves"
        await stream.done_writing()


async def test_message_too_large_is_refused_with_its_size_and_the_bound(server: Server) -> None:
    limit = server.info.max_message_bytes
    async with open_channel(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=rf"larger than max \(\d+ vs\. {limit}\)") as refused:
            await execute_method(channel)(edited(server, lambda m: setattr(m, "hidden", bytes(limit + 1))))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await execute_method(channel)(request(server))).partials


async def test_the_largest_allowed_request_and_reply_fit_the_message_limit(server: Server) -> None:
    async with open_channel(server) as channel:
        call = call_for(server, good_batch(MAX_TOKENS))
        plain = replace(call, hidden=torch.randn(MAX_TOKENS, 256).bfloat16(), scales=None)
        for message in map(Request.FromString, map(codec.encode_call, (call, plain))):
            answer = await execute_method(channel)(message)
            assert len(answer.partials) == MAX_TOKENS * 256 * 4


async def test_garbage_bytes_are_refused_and_the_server_lives(server: Server) -> None:
    truncated = request(server).SerializeToString()[:-10]
    async with open_channel(server) as channel:
        raw: Any = channel.unary_unary(f"/{codec.SERVICE}/Execute")
        for garbage in (b"\xff" * 100, b"\x4a\xff\xff\xff\xff\x7f", truncated):
            with pytest.raises(
                grpc.aio.AioRpcError, match=r"bytes received are no expertd.v1.ExecuteRequest"
            ) as refused:
                await raw(garbage)
            assert refused.value.code() == INVALID
        assert (await execute_method(channel)(request(server))).partials
