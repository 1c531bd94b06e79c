"""Loads that change: servers that are rebalanced while all of them are called."""

import asyncio
import contextlib
from pathlib import Path

import pytest

from expertd.client.placement.rebalance import rebalance
from tests.chaos.fleet import Fleet
from tests.chaos.load import CheckedLoad, make_cases
from tests.chaos.scale import hold, scaled
from tests.client.placement.said import Said, rebalance_arguments

LOADS = scaled(10, 2)
MOST = scaled(3, 12)
CALLS = 30
OPTIONS = ("--admin-listen", "127.0.0.1:0", "--per-expert-metrics")
WATCH = ("--slots", "7", "--watch", "1", "--pause", "0.05", "--apply")
BEFORE = r"balancedness [^\d]*([\d.]+) ->"


async def rounds_until_even(said: Said) -> int:
    """Few calls are answered in a second where others use the machine: then what was hot in it is a matter of luck."""
    for number in range(MOST):
        if float((await said.wait_for(BEFORE))[1]) > 0.9:
            return number + 1
    raise AssertionError(f"uneven after {MOST} rounds: {said.all}")


async def test_loads_that_change_are_even_after_two_rounds(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zipf 1.0 on 4 servers, and from time to time other experts that are hot."""
    async with Fleet(small_model, tmp_path) as fleet:
        servers = [await fleet.start(experts, options=OPTIONS) for experts in ("0-3", "4-7", "8-11", "12-15")]
        named, said = [server.address for server in servers], Said(capsys)
        rounds: list[int] = []
        async with CheckedLoad(named, small_model) as load:
            watching = asyncio.create_task(rebalance(rebalance_arguments(*named, *WATCH)))
            for number in range(LOADS):
                load.cases = make_cases(small_model, number, sizes=(48,), zipf=1.0)
                await load.answered(CALLS)
                said.forget()
                # The first is of a second that had begun before.
                await said.wait_for(BEFORE)
                rounds.append(await rounds_until_even(said))
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            await load.answered(CALLS)
        with capsys.disabled():
            print("", *(line for line in said.all.splitlines() if "->" in line or "read in" in line), sep="\n")
            hold(load.report, f"{LOADS} loads, even after {rounds} rounds", LOADS * CALLS)
        assert load.report.failed == 0
