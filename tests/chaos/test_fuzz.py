"""Messages of all kinds of nonsense to every RPC: documented answers only, and the server goes on."""

import asyncio
import contextlib
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.proto import codec
from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import InvalidBatch, ServerFault
from expertd.proto.codec import wire
from tests.chaos.fleet import Fleet, ServerProcess
from tests.chaos.scale import scaled
from tests.support.model.messages import encode_result
from tests.support.model.requests import parse_request
from tests.support.serving import random_batch, request_for

MESSAGES = scaled(100_000, 2_000)
PER_EXAMPLE = 40
SECONDS = 30.0
"""After which an RPC counts as hanging."""
CODES = grpc.StatusCode
DOCUMENTED = {
    CODES.OK,
    CODES.INVALID_ARGUMENT,
    CODES.NOT_FOUND,
    CODES.FAILED_PRECONDITION,
    CODES.ABORTED,
    CODES.RESOURCE_EXHAUSTED,
    CODES.DEADLINE_EXCEEDED,
    CODES.CANCELLED,
}
LIBRARY = DOCUMENTED | {CODES.INTERNAL, CODES.UNIMPLEMENTED, CODES.UNKNOWN}
"""What grpcio's health and reflection services say to bytes that they cannot read."""
NUMBERS = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1), st.sampled_from([7, 2**31, 2**32 - 1, 2**63]))
"""Sizes, bounds and beyond; 7 is the request_id of all valid messages."""


@dataclass(frozen=True, slots=True)
class Target:
    """A running server, and everything that is sent to it."""

    server: ServerProcess
    valid: bytes
    runner: asyncio.Runner
    call: Callable[[str, Sequence[bytes]], Coroutine[None, None, list[grpc.StatusCode]]]


@pytest.fixture(scope="module")
def target(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        yield runner.run(_serve(small_model, tmp_path_factory.mktemp("fuzz"), runner, stack))
        runner.run(stack.aclose())


async def _serve(model: Path, folder: Path, runner: asyncio.Runner, stack: contextlib.AsyncExitStack) -> Target:
    fleet = await stack.enter_async_context(Fleet(model, folder))
    server = await fleet.start("0-15", options=("--max-tokens-per-request", "64"))
    transport = GrpcTransport(server.address)
    shard = await transport.get_shard(10.0)
    await transport.close()
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))

    async def call(method: str, messages: Sequence[bytes]) -> list[grpc.StatusCode]:
        async with asyncio.timeout(SECONDS):
            return await _METHODS[method](channel, f"/{method}", messages)

    valid = request_for(shard, random_batch(5, 256, 16, 4)).SerializeToString()
    return Target(server, valid, runner, call)


async def _unary(channel: grpc.aio.Channel, path: str, messages: Sequence[bytes]) -> list[grpc.StatusCode]:
    method: Any = channel.unary_unary(path)
    return list(await asyncio.gather(*(_status(method(message)) for message in messages)))


async def _server_stream(channel: grpc.aio.Channel, path: str, messages: Sequence[bytes]) -> list[grpc.StatusCode]:
    async def first(message: bytes) -> grpc.StatusCode:
        method: Any = channel.unary_stream(path)
        call = method(message)
        status = await _status(call.read())
        call.cancel()
        return status

    return list(await asyncio.gather(*map(first, messages)))


async def _stream(channel: grpc.aio.Channel, path: str, messages: Sequence[bytes]) -> list[grpc.StatusCode]:
    method: Any = channel.stream_stream(path)
    call = method(iter(messages))
    try:
        answers = [answer async for answer in call]
    except grpc.aio.AioRpcError as error:
        return [error.code()]
    return [_answer_status(answer) if path == f"/{STREAM}" else CODES.OK for answer in answers]


def _answer_status(answer: bytes) -> grpc.StatusCode:
    code = pb.ExecuteResponse.FromString(answer).error.code
    return next(status for status in CODES if status.value[0] == code)


async def _status(call: Awaitable[object]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return CODES.OK


EXECUTE, STREAM, SHARD = (f"{codec.SERVICE}/{name}" for name in ("Execute", "ExecuteStream", "GetShard"))
CHECK, WATCH = (f"grpc.health.v1.Health/{name}" for name in ("Check", "Watch"))
REFLECTION = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_METHODS = {
    EXECUTE: _unary,
    STREAM: _stream,
    SHARD: _unary,
    CHECK: _unary,
    WATCH: _server_stream,
    REFLECTION: _stream,
}


@st.composite
def edits(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A way to spoil a message: bytes of it changed, cut or added, or fields of it set to what they should not be."""
    kind = draw(st.sampled_from(["nonsense", "bytes", "cut", "number", "tensor", "text"]))
    if kind == "nonsense":
        nonsense = draw(st.binary(max_size=64))
        return lambda message: nonsense
    if kind == "bytes":
        places = draw(
            st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)
        )
        return lambda message: _overwritten(message, places)
    if kind == "cut":
        start, end, tail = draw(st.floats(0, 1)), draw(st.floats(0, 1)), draw(st.binary(max_size=8))
        return lambda message: message[: int(start * len(message))] + message[int(end * len(message)) :] + tail
    if kind == "number":
        field, value = draw(st.sampled_from([1, 3, 4, 5, 6, 7, 8, 13, 16])), draw(NUMBERS)
        # The last of several occurrences counts.
        return lambda message: message + wire.tag(field, wire.VARINT) + wire.varint(value)
    field = draw(st.sampled_from([9, 10, 11, 12])) if kind == "tensor" else 2
    content = draw(st.binary(max_size=80)) * draw(st.sampled_from([1, 1, 16]))
    return lambda message: message + wire.tag(field, wire.BYTES) + wire.varint(len(content)) + content


def _overwritten(message: bytes, places: Sequence[tuple[float, int]]) -> bytes:
    spoilt = bytearray(message)
    for place, value in places:
        spoilt[int(place * len(spoilt))] = value
    return bytes(spoilt)


def _wants_an_answer(message: bytes) -> bool:
    """Whether it is a request, or nothing that can be read, and not the cancellation of one."""
    try:
        return parse_request(message).cancels is None
    except (InvalidBatch, ServerFault):
        return True


SHARES = {EXECUTE: 0.4, STREAM: 0.4, SHARD: 0.08, CHECK: 0.06, WATCH: 0.03, REFLECTION: 0.03}


@pytest.mark.parametrize("method", SHARES)
def test_nonsense_is_answered_as_documented(target: Target, method: str) -> None:
    examples = max(1, int(SHARES[method] * MESSAGES) // PER_EXAMPLE)
    allowed = DOCUMENTED if codec.SERVICE in method else LIBRARY
    outcomes: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(edits(), min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
    def send(spoil: list[Callable[[bytes], bytes]]) -> None:
        messages = [edit(target.valid) for edit in spoil]
        codes = target.runner.run(target.call(method, messages))
        assert set(codes) <= allowed
        if method == STREAM:
            assert len(codes) == sum(map(_wants_an_answer, messages)), "one answer for each request"
        outcomes.update(code.name for code in codes)
        outcomes["messages"] += len(messages)

    send()
    print(f"\nfuzz {method}: {outcomes.pop('messages')} messages, 0 violations, {dict(outcomes)}")
    assert target.server.process.is_alive()
    log = target.server.log.read_text()
    assert codec.SERVICE not in method or "Traceback" not in log, log[-3000:]
    # Whatever it went through, it still computes.
    assert target.runner.run(target.call(EXECUTE, [target.valid])) == [CODES.OK]


def test_readers_of_messages_raise_nothing_but_errors_of_the_project(target: Target, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no build for this Python")
    (tmp_path / "request").write_bytes(target.valid)
    answer = encode_result(codec.ExecuteResult(1, torch.zeros(2, 256), {3: 2}, codec.StageTimings()))
    (tmp_path / "response").write_bytes(answer)
    fuzzer = [sys.executable, "-m", "tests.chaos.fuzz_codec", f"-atheris_runs={MESSAGES}", "-max_len=8192"]
    # Torch alone, instrumented, has the 2 GiB that are the default, which is looked at once a second.
    fuzzer.append("-rss_limit_mb=4096")
    ended = subprocess.run([*fuzzer, str(tmp_path)], capture_output=True, text=True, timeout=1200, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    print(f"\natheris: {MESSAGES} messages, 0 crashes; {ended.stderr.strip().splitlines()[-1]}")
