"""Killing server processes under load: the caller sees right results and no error."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import torch

from expertd.client.cluster import LocalCluster
from expertd.client.config import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.gate import load_gates
from expertd.kernels.checkpoint import Checkpoint
from expertd.kernels.reference import relative_error

CALLERS = 4
KILLS = 2
CALLS_BETWEEN_KILLS = 20


async def test_killed_replicas_cost_a_retry_and_nothing_else(small_model: Path) -> None:
    with Checkpoint(small_model) as checkpoint:
        gates = load_gates(checkpoint, (1,))
    config = CoordinatorConfig(gates=gates, connect_timeout=5.0)
    exact = replace(config, hidden_dtype=torch.bfloat16, reply_dtype=torch.float32, output_dtype=torch.float32)
    hidden = torch.randn(16, 256).bfloat16()
    replicas = ["0-7"] * (KILLS + 1) + ["8-15"]
    options = ["--backend", "torch", "--threads", "1"]
    async with LocalCluster(small_model, replicas, options) as cluster, Coordinator(cluster.addresses, exact) as moe:
        right = await moe(1, hidden)
        seconds: list[float] = []
        killing = True

        async def caller() -> None:
            while killing:
                started = time.perf_counter()
                assert relative_error(await moe(1, hidden), right) < 1e-6
                seconds.append(time.perf_counter() - started)

        async def more_calls() -> None:
            before = len(seconds)
            while len(seconds) < before + CALLS_BETWEEN_KILLS:
                await asyncio.sleep(0.01)

        async def killer() -> None:
            nonlocal killing
            for server in cluster.servers[:KILLS]:
                await more_calls()
                server.process.kill()
                await server.process.wait()
            await more_calls()
            killing = False

        async with asyncio.timeout(60):
            await asyncio.gather(killer(), *(caller() for _ in range(CALLERS)))
        assert len(seconds) >= (KILLS + 1) * CALLS_BETWEEN_KILLS
        assert max(seconds) < config.attempt_timeout, "no call waited for an attempt to time out"
