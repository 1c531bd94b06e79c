"""Shared experts of transformers' models are computed here while servers in this process compute the routed ones."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FineGrainedFP8Config

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.integrations.huggingface import NAME, RemoteExperts, register, unregister
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.proto.base.errors import DeadlineExceeded
from expertd.server.app import Server
from tests.support.coordinators import free_bytes, segments_of
from tests.support.families import write_family
from tests.support.generation import Model, generate, in_thread, load, logits, one_after_the_other, prompts, watch_calls
from tests.support.serving import Gate, running_server, until

SHARING = CoordinatorConfig()
GRPC = CoordinatorConfig(shared_memory_bytes=0)
LAYERS = 2


@pytest.fixture(scope="module", params=["deepseek_v3", "glm4_moe"])
def folder(request: pytest.FixtureRequest, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a family with shared experts."""
    if request.param == "deepseek_v3":
        return small_model
    return write_family(tmp_path_factory.mktemp("shared"), request.param).quantized


@pytest.fixture
async def servers(folder: Path) -> AsyncIterator[list[Server]]:
    async with running_server(folder, range(8)) as low, running_server(folder, range(8, 16)) as high:
        yield [low, high]
        unregister()


@pytest.fixture(params=[SHARING, GRPC], ids=["shared-memory", "grpc"])
def config(request: pytest.FixtureRequest) -> CoordinatorConfig:
    chosen: CoordinatorConfig = request.param
    return chosen


@pytest.fixture
def gates(servers: list[Server]) -> list[Gate]:
    return [Gate(server) for server in servers]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return watch_calls(monkeypatch)


def registered(servers: list[Server], config: CoordinatorConfig = SHARING) -> RemoteExperts:
    return register([str(server.address) for server in servers], config)


def load_remote(folder: Path) -> Model:
    dequantized = FineGrainedFP8Config(dequantize=True)
    return load(folder, NAME, quantization_config=dequantized, dtype=torch.bfloat16)


def blocks_with_shared(model: Model) -> list[Any]:
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "shared_experts")]


def after_shared(model: Model, call: Callable[[], None]) -> None:
    """Have `call` called whenever shared experts of `model` have been computed."""
    for block in blocks_with_shared(model):
        block.shared_experts.register_forward_hook(lambda *_: call())


def until_reached(gates: list[Gate]) -> None:
    """On a thread: until every server's device has a call."""
    asyncio.run(until(lambda: all(gate.reached for gate in gates)))


async def test_they_run_while_the_servers_compute(
    servers: list[Server], folder: Path, config: CoordinatorConfig, gates: list[Gate], events: list[str]
) -> None:
    def computed() -> None:
        events.append("shared")
        # Before, no server can have answered.
        until_reached(gates)
        for gate in gates:
            gate.open()

    def check() -> None:
        with registered(servers, config):
            model = load_remote(folder)
            after_shared(model, computed)
            assert logits(model, prompts()).isfinite().all()

    await in_thread(check)
    assert events == ["submitted", "shared", "collected"] * LAYERS


async def test_the_bits_are_those_of_one_after_the_other(
    servers: list[Server], folder: Path, config: CoordinatorConfig
) -> None:
    def check() -> None:
        with registered(servers, config):
            model = load_remote(folder)
            tokens, overlapped = generate(model, prompts()), logits(model, prompts(3, 40))
            with one_after_the_other(model):
                assert torch.equal(logits(model, prompts(3, 40)), overlapped)
                assert torch.equal(generate(model, prompts()), tokens)

    await in_thread(check)


async def test_a_model_that_was_there_before_overlaps_too_and_only_while_it_is_remote(
    servers: list[Server], folder: Path, events: list[str]
) -> None:
    def check() -> None:
        model = load(folder, "eager", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16)
        after_shared(model, lambda: events.append("shared"))
        forwards = [type(block).forward for block in blocks_with_shared(model)]
        with registered(servers):
            local = logits(model, prompts())
            model.set_experts_implementation(NAME)
            logits(model, prompts())
            model.set_experts_implementation("eager")
            assert torch.equal(logits(model, prompts()), local)
        assert [type(block).forward for block in blocks_with_shared(model)] == forwards

    await in_thread(check)
    alone = ["shared"] * LAYERS
    assert events == [*alone, *["submitted", "shared", "collected"] * LAYERS, *alone]


async def test_errors_of_the_servers_are_those_of_one_after_the_other(
    servers: list[Server], folder: Path, gates: list[Gate]
) -> None:
    def fails(model: Model) -> None:
        with pytest.raises(DeadlineExceeded, match=r"^127\.0\.0\.1:\d+: no answer within 0\.\d+ s$"):
            logits(model, prompts())

    def check() -> None:
        with registered(servers, replace(SHARING, call_timeout=0.5)):
            model = load_remote(folder)
            fails(model)
            with one_after_the_other(model):
                fails(model)
            for gate in gates:
                gate.open()

    await in_thread(check)


async def test_when_they_raise_the_call_is_given_up_and_nothing_is_left(
    servers: list[Server], folder: Path, config: CoordinatorConfig, gates: list[Gate], events: list[str]
) -> None:
    class Broken(Exception):
        pass

    def break_down() -> None:
        until_reached(gates)
        raise Broken

    def check() -> None:
        with registered(servers, config) as experts:
            model = load_remote(folder)
            members = list(experts._moe._coordinator._connected().membership.members.values())
            after_shared(model, break_down)
            # Kept, with the frames of the call: nothing is given up because they are let go.
            with pytest.raises(Broken) as raised:
                logits(model, prompts())
            assert events == ["submitted"]
            asyncio.run(until(lambda: not any(one.outstanding_tokens or one.under_way for one in members)))
            for gate in gates:
                gate.open()
            sharing = [one.transport for one in members if isinstance(one.transport, SharedMemoryTransport)]
            segments = [segment for transport in sharing for segment in segments_of(transport)]
            asyncio.run(until(lambda: all(free_bytes(segment) == segment.size for segment in segments)))
            assert raised.type is Broken
            assert logits(load_remote(folder), prompts()).isfinite().all()

    await in_thread(check)
