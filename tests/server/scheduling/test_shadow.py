"""The shadow check: what it says of right and wrong servers, and that it stays out of the way."""

import asyncio
import math
import threading
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch

from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.torch.backend import TorchBackend
from expertd.kernels.weights.experts import ExpertMatrices
from expertd.proto import expert_shard_pb2 as pb
from expertd.server.app import Server
from tests.support.serving import execute_method, open_channel, random_batch, request_for, running_server, shadow_checks

EXPERTS, HIDDEN, TOP_K = 16, 256, 4
SEED = 1627694678
WAITING = 8
"""Tokens that may wait for the check."""


async def until(server: Server, outcome: str, count: float) -> None:
    async with asyncio.timeout(30):
        while shadow_checks(server, outcome) < count:
            await asyncio.sleep(0.01)


async def execute(channel: grpc.aio.Channel, server: Server, batch: TokenBatch, **changes: Any) -> pb.ExecuteResponse:  # noqa: ANN401
    response: pb.ExecuteResponse = await execute_method(channel)(request_for(server, batch, **changes))
    return response


@pytest.mark.parametrize("reply_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
async def test_answers_of_a_right_server_are_right(small_model: Path, reply_dtype: torch.dtype) -> None:
    async with running_server(small_model, range(EXPERTS), shadow_check_rate=1.0) as server:
        async with open_channel(server) as channel:
            for seed in range(5):
                batch = random_batch(9, HIDDEN, EXPERTS, TOP_K, seed=seed)
                await execute(channel, server, batch, reply_dtype=reply_dtype)
                await until(server, "ok", seed + 1)
        assert shadow_checks(server, "mismatch") == 0
        errors = server.metrics.registry.get_sample_value("expertd_shadow_relative_error_sum")
        assert errors is not None
        assert errors / 5 < (5e-3 if reply_dtype == torch.bfloat16 else 1e-6), (
            "those of FP8 are taken before they are rounded"
        )


async def test_a_damaged_expert_is_counted_and_named(small_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running_server(small_model, range(4, 12), shadow_check_rate=1.0) as server:
        assert isinstance(server.backend, TorchBackend)
        server.backend._layers[1][1][3] *= 1.05
        batch = random_batch(1, HIDDEN, EXPERTS, 1, absent=0.0)
        batch.expert_ids[:] = 7
        async with open_channel(server) as channel:
            await execute(channel, server, batch)
        await until(server, "mismatch", 1)
    assert "shadow check: layer 1, experts [7]: relative error 0.05 exceeds 0.005" in caplog.text


@pytest.mark.parametrize("reply_dtype", [torch.float32, torch.bfloat16])
async def test_sums_too_small_for_their_type_are_no_alarm(small_model: Path, reply_dtype: torch.dtype) -> None:
    batch = random_batch(1, HIDDEN, EXPERTS, TOP_K, absent=0.0)
    batch.weights.fill_(2.0**-132)
    async with running_server(small_model, range(EXPERTS), shadow_check_rate=1.0) as server:
        async with open_channel(server) as channel:
            await execute(channel, server, batch, reply_dtype=reply_dtype)
        await until(server, "ok", 1)
        assert shadow_checks(server, "mismatch") == 0


@pytest.mark.parametrize("weight", [2.0**-100, 1.0, 2.0**100])
async def test_zeros_in_place_of_sums_are_an_alarm(small_model: Path, weight: float) -> None:
    batch = random_batch(1, HIDDEN, EXPERTS, TOP_K, absent=0.0)
    batch.weights.fill_(weight)
    async with running_server(small_model, range(EXPERTS), shadow_check_rate=1.0) as server:
        assert isinstance(server.backend, TorchBackend)
        for layer in server.backend._layers[1]:
            layer.zero_()
        async with open_channel(server) as channel:
            await execute(channel, server, batch)
        await until(server, "mismatch", 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("reply_dtype", [torch.float32, torch.bfloat16])
async def test_hidden_states_that_are_not_finite_are_no_alarm(
    small_model: Path, value: float, reply_dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    batch = random_batch(1, HIDDEN, EXPERTS, TOP_K, absent=0.0)
    hidden = torch.randn(1, HIDDEN).bfloat16()
    hidden[0, 3] = value
    odd = TokenBatch(hidden, None, batch.expert_ids, batch.weights)
    async with running_server(small_model, range(EXPERTS), shadow_check_rate=1.0) as server:
        async with open_channel(server) as channel:
            await execute(channel, server, odd, reply_dtype=reply_dtype)
        await until(server, "ok", 1)
        assert shadow_checks(server, "mismatch") == 0
    assert "shadow check" not in caplog.text


async def test_nan_from_finite_hidden_states_is_an_alarm(small_model: Path) -> None:
    async with running_server(small_model, range(EXPERTS), shadow_check_rate=1.0) as server:
        assert isinstance(server.backend, TorchBackend)
        for layer in server.backend._layers[1]:
            layer *= math.nan
        async with open_channel(server) as channel:
            await execute(channel, server, random_batch(1, HIDDEN, EXPERTS, TOP_K, absent=0.0))
        await until(server, "mismatch", 1)


async def test_a_busy_check_drops_and_never_makes_requests_wait(small_model: Path) -> None:
    released = threading.Event()

    batch = random_batch(3, HIDDEN, EXPERTS, TOP_K, absent=0.0)
    async with running_server(small_model, range(EXPERTS), shadow_check_rate=1.0) as server:
        assert server.shadow is not None
        read = server.shadow.read

        def waiting(fingerprint: str, layer: int, expert: int) -> ExpertMatrices | None:
            released.wait()
            return read(fingerprint, layer, expert)

        server.shadow.read = waiting
        async with open_channel(server) as channel:
            for _ in range(WAITING + 3):
                await execute(channel, server, batch)
        # One may have been taken out of the queue already.
        assert shadow_checks(server, "dropped") in (2, 3)
        assert shadow_checks(server, "ok") == 0
        released.set()
        await until(server, "ok", WAITING + 3 - shadow_checks(server, "dropped"))


async def test_a_checkpoint_that_went_away_does_not_stop_serving(small_model: Path) -> None:
    def failing(*_: object) -> ExpertMatrices:
        raise OSError("the disk is gone")

    batch = random_batch(3, HIDDEN, EXPERTS, TOP_K, absent=0.0)
    async with running_server(small_model, range(EXPERTS), shadow_check_rate=1.0) as server:
        assert server.shadow is not None
        server.shadow.read = failing
        for count in (1, 2):
            async with open_channel(server) as channel:
                await execute(channel, server, batch)
            await until(server, "failed", count)


async def test_a_check_of_weights_that_were_released_is_dropped(
    small_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_server(small_model, range(EXPERTS), shadow_check_rate=1.0) as server:
        assert server.shadow is not None
        read = server.shadow.read
        server.shadow.read = lambda _, layer, expert: read("f" * 32, layer, expert)
        async with open_channel(server) as channel:
            await execute(channel, server, random_batch(3, HIDDEN, EXPERTS, TOP_K, absent=0.0))
        await until(server, "dropped", 1)
        assert shadow_checks(server, "failed") == 0
    assert "shadow check" not in caplog.text


async def test_without_the_option_there_is_neither_thread_nor_metric(small_model: Path) -> None:
    async with running_server(small_model, range(EXPERTS)) as server:
        assert server.shadow is None
        assert server.metrics.registry.get_sample_value("expertd_shadow_checks_total", {"outcome": "ok"}) is None
        assert "shadow-check" not in {thread.name for thread in threading.enumerate()}


async def test_the_rate_is_the_share_of_requests(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the engine's first five draws with this seed, two are below the rate.
    monkeypatch.setattr("expertd.server.scheduling.shadow.random.getrandbits", lambda _: SEED)
    batch = random_batch(3, HIDDEN, EXPERTS, TOP_K)
    async with running_server(small_model, range(EXPERTS), shadow_check_rate=0.25) as server:
        async with open_channel(server) as channel:
            for _ in range(5):
                await execute(channel, server, batch)
        await until(server, "ok", 2)
    assert shadow_checks(server, "ok") == 2
