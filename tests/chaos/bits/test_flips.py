"""A flipped bit never becomes an answer: it is found, or what comes is what comes without it, bit for bit."""

import asyncio
import contextlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch

from expertd.client.call.dispatch import Work, check_receipt
from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.experts import expert_tensors, load_layer
from expertd.kernels.weights.ledger import Ledger
from expertd.kernels.weights.manifest import MANIFEST, Manifest
from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError
from expertd.proto.codec import ExecuteCall
from tests.chaos.bits.flips import HARMLESS, FlippedLane, LaneCase, WrongAnswer, flip
from tests.chaos.fleet import Fleet
from tests.chaos.scale import scaled
from tests.support.serving import call_for, random_batch

FLIPS = int(os.environ.get("EXPERTD_FLIPS", scaled(100_000, 300)))
"""Of each kind."""
TOGETHER = 100
EXPERTS, TOP_K, WIDTH = 16, 4, 256
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TINY = DemoModel(
    hidden_size=128, moe_intermediate_size=128, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
    moe_layers=1,
)  # fmt: skip


def tell(what: str, outcomes: Counter[str]) -> None:
    """Print what came of the flips, and fail unless there were as many as wanted and most were found."""
    print(f"\nflips of {what}: {outcomes.total()}, 0 wrong answers; {dict(outcomes.most_common())}")
    assert outcomes.total() == FLIPS
    assert outcomes[HARMLESS] < 0.5 * FLIPS


@pytest.fixture(scope="module")
def served(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Any, Any]]:
    """A loop, a way to call a server of all experts over gRPC, and calls that it answers."""
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()

        async def begin() -> tuple[Any, list[ExecuteCall]]:
            fleet = await stack.enter_async_context(Fleet(small_model, tmp_path_factory.mktemp("flips")))
            server = await fleet.start("0-15")
            transport = GrpcTransport(server.address)
            shard = await transport.get_shard(10.0)
            await transport.close()
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
            small, large = (random_batch(tokens, WIDTH, EXPERTS, TOP_K, seed=tokens) for tokens in (1, 5))
            calls = [
                call_for(shard, small, timeout=10.0),
                call_for(shard, large, traceparent=TRACE, reply_dtype=torch.bfloat16),
            ]
            wide = large.hidden.float().bfloat16()
            calls += [replace(calls[0], reply_dtype=torch.float8_e4m3fn)]
            calls += [replace(calls[1], request_id=2**40, hidden=wide, scales=None, placement_epoch=None)]
            return channel.unary_unary(f"/{codec.SERVICE}/Execute"), calls

        execute, calls = runner.run(begin())
        yield runner, execute, calls
        runner.run(stack.aclose())


def read(call: ExecuteCall, reply: bytes) -> bytes:
    """The sums in a reply, as a coordinator takes them. Raises an `ExpertdError`."""
    response = codec.parse_response(reply)
    tokens, width = call.hidden.shape
    result = codec.decode_result(response, tokens, width, call.reply_dtype)
    check_receipt(Work(torch.arange(tokens), call.expert_ids, call.weights), result.receipt, "server")
    return bytes(response.partials)


def test_of_requests_over_grpc(served: tuple[asyncio.Runner, Callable[[bytes], Awaitable[bytes]], Any]) -> None:
    runner, execute, calls = served
    chance, outcomes = random.Random(1), Counter[str]()

    async def strike(call: ExecuteCall, right: bytes) -> None:
        message = bytearray(codec.encode_call(call, checked=True))
        flip(message, chance.randrange(min(len(message), chance.choice((120, 1 << 20)))), chance)
        try:
            reply = await execute(bytes(message))
        except grpc.aio.AioRpcError as error:
            outcomes[error.code().name] += 1
            return
        if read(call, reply) != right:
            raise WrongAnswer(bytes(message).hex())
        outcomes[HARMLESS] += 1

    async def run() -> None:
        right = [read(call, await execute(codec.encode_call(call, checked=True))) for call in calls]
        for first in range(0, FLIPS, TOGETHER):
            cases = [(calls[n % len(calls)], right[n % len(calls)]) for n in range(first, min(first + TOGETHER, FLIPS))]
            await asyncio.gather(*(strike(*case) for case in cases))

    runner.run(run())
    tell("requests over gRPC", outcomes)
    assert outcomes["INTERNAL"] > 0.3 * FLIPS


def test_of_replies_over_grpc(served: tuple[asyncio.Runner, Callable[[bytes], Awaitable[bytes]], Any]) -> None:
    runner, execute, calls = served

    async def ask() -> list[bytes]:
        return [await execute(codec.encode_call(call, checked=True)) for call in calls]

    replies = runner.run(ask())
    right = [read(call, reply) for call, reply in zip(calls, replies, strict=True)]
    chance, outcomes = random.Random(2), Counter[str]()
    for number in range(FLIPS):
        case = number % len(calls)
        reply = bytearray(replies[case])
        at = chance.randrange(len(reply)) if chance.random() < 0.5 else -1 - chance.randrange(120)
        flip(reply, at % len(reply) if chance.random() < 0.9 else chance.randrange(12), chance)
        try:
            sums = read(calls[case], bytes(reply))
        except ExpertdError as error:
            outcomes[type(error).__name__] += 1
            continue
        if sums != right[case]:
            raise WrongAnswer(bytes(reply).hex())
        outcomes[HARMLESS] += 1
    tell("replies over gRPC", outcomes)


@pytest.mark.parametrize("what", ["requests", "answers"])
def test_of_shared_memory(what: str) -> None:
    chance, outcomes = random.Random(3), Counter[str]()
    cases = [LaneCase.make(chance) for _ in range(24)]
    lane = FlippedLane()
    right = [lane.call(case, None, answer=False) for case in cases]
    for number in range(FLIPS):
        if not lane.is_sound:
            lane = FlippedLane()
        case = number % len(cases)
        sums = right[case]
        assert isinstance(sums, bytes)
        outcome = lane.call(cases[case], chance, answer=what == "answers", right=sums)
        assert isinstance(outcome, str)
        outcomes[outcome] += 1
    tell(f"{what} in shared memory", outcomes)


def test_of_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    whole, struck = write_demo_checkpoint(tmp_path / "whole", TINY), tmp_path / "struck"
    with Checkpoint(whole) as checkpoint:
        (whole / MANIFEST).write_text(Manifest.of(checkpoint, lambda _: None).text)
    shutil.copytree(whole, struck)
    chance, outcomes = random.Random(4), Counter[str]()
    places, right = readable_places(whole), loaded(whole)
    for _ in range(FLIPS):
        name, begin, end = chance.choice(places)
        at, bit = chance.randrange(begin, end), 1 << chance.randrange(8)
        flip_in(struck / name, at, bit)
        try:
            found = loaded(struck)
        except (CheckpointError, InvalidConfig) as error:
            outcomes[type(error).__name__] += 1
        else:
            if found[1:] != right[1:]:
                raise WrongAnswer(f"{name}: {found[1:2]} instead of {right[1:2]}")
            outcomes[HARMLESS if found[0] == right[0] else "another fingerprint"] += 1
        flip_in(struck / name, at, bit)
    tell("files of a checkpoint", outcomes)


def flip_in(file: Path, at: int, bit: int) -> None:
    with file.open("r+b") as content:
        content.seek(at)
        (byte,) = content.read(1)
        content.seek(at)
        content.write(bytes([byte ^ bit]))


def readable_places(folder: Path) -> list[tuple[str, int, int]]:
    """Where a server reads: every expert's tensors, the headers before them, and files of text."""
    places = [(file.name, 0, file.stat().st_size) for file in sorted(folder.glob("*.json"))]
    for file in sorted(folder.glob("*.safetensors")):
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        places += [(file.name, 0, header)]
    with Checkpoint(folder) as checkpoint:
        (layer,), experts = checkpoint.config.moe_layers, range(checkpoint.config.n_routed_experts)
        stored = [one for expert in experts for one in expert_tensors(checkpoint, layer, expert)]
    return places + [(one.file.name, one.start, one.start + one.num_bytes) for one in stored]


def loaded(folder: Path) -> tuple[str, Any, bytes]:
    """The fingerprint, the config and the weights that a server would serve."""
    with Checkpoint(folder) as checkpoint:
        ledger = Ledger(checkpoint)
        config = checkpoint.config
        (layer,) = config.moe_layers
        weights = load_layer(checkpoint, layer, range(config.n_routed_experts), lambda _: None, ledger.settle)
        content = b"".join(codec.flat_bytes(part).numpy().tobytes() for part in weights.tensors)
        return ledger.fingerprint, config, content
