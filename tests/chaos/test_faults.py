"""Every kind of fault, many times, under load: each result is right, or the call fails with an error of its own."""

import asyncio
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.fleet import Fleet, ServerProcess
from tests.chaos.load import CONFIG, CheckedLoad
from tests.chaos.scale import hold, scaled

SEEDS = scaled(100, 2)
CALLS = 20
"""At least, with each seed."""
FAULTS = {
    "delay": "delay=0.3:0.2",
    "drop": "drop=0.05",
    "reset": "reset=0.1",
    "corrupt_request": "corrupt_request=0.2",
    "corrupt_reply": "corrupt_reply=0.2",
    "wrong_receipt": "wrong_receipt=0.2",
    "crash_before": "crash_before=0.1",
    "crash_after": "crash_after=0.1",
    "device_error": "device_error=0.1",
    "stuck_device": "stuck_device=0.1:1.0",
    "slow_loading": "slow_loading=0.7:0.3",
    "stale_epoch": "stale_epoch=0.1",
    "freeze": "",
}
"""By kind; freeze is SIGSTOP. Sound replicas of all experts stand beside the faulty server."""
FROZEN_SECONDS = 2.7
"""Longer than it takes to find out, and shorter than `attempt_timeout`, which would hide that nobody did."""
WAYS = {"grpc": CONFIG, "lane": replace(CONFIG, shared_memory_bytes=1 << 25, checksums="always")}
"""How calls go to all of the servers."""
HURRIED = ("--device-timeout", "0.3")
ENDS = {"crash_before": -signal.SIGKILL, "crash_after": -signal.SIGKILL, "device_error": 1}
"""Exit codes of servers that end by themselves."""


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind in FAULTS for way in WAYS])
async def test_results_are_right_whatever_one_replica_does(
    small_model: Path, tmp_path: Path, kind: str, way: str
) -> None:
    async with Fleet(small_model, tmp_path) as fleet:
        servers = [await fleet.start(experts) for experts in ("0-7", "0-7", "8-15", "8-15")]
        faulty = servers[0]
        load = CheckedLoad([server.address for server in servers], small_model, config=WAYS[way])
        strikes = 0
        async with load:
            for seed in range(SEEDS):
                faulty.signal(signal.SIGKILL)
                await faulty.exit_code()
                text = f"{FAULTS[kind]},seed={seed}" if FAULTS[kind] else ""
                faulty = await fleet.restart(faulty, text, HURRIED if kind == "stuck_device" else ())
                strikes += await strike(load, faulty, kind)
                await load.answered(CALLS)
        hold(load.report, f"{kind} by {way}, {SEEDS} seeds, {strikes} strikes", SEEDS * CALLS)
        assert strikes >= 0.5 * SEEDS
        # With a sound replica for every expert, no caller need see any of it.
        assert load.report.failed == 0


async def strike(load: CheckedLoad, server: ServerProcess, kind: str) -> int:
    """Let the fault happen at least once; how often it did."""
    if kind == "slow_loading":
        return server.strikes()
    if kind == "freeze":
        await load.uses(server.address, since=time.monotonic())
        server.signal(signal.SIGSTOP)
        await asyncio.sleep(FROZEN_SECONDS)
        server.signal(signal.SIGCONT)
        return 1
    if kind in ENDS:
        assert await server.exit_code() == ENDS[kind]
        return server.strikes()
    async with asyncio.timeout(30):
        while not server.strikes():
            await asyncio.sleep(0.02)
    return server.strikes()
