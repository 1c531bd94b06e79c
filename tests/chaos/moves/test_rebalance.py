"""Loads that change: servers that are rebalanced while all of them are called."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from expertd.cli import main
from tests.chaos.fleet import Fleet
from tests.chaos.load import CheckedLoad, make_cases
from tests.chaos.scale import hold, scaled

ROUNDS = scaled(10, 2)
CALLS = 30
OPTIONS = ("--admin-listen", "127.0.0.1:0", "--per-expert-metrics")
SLOTS = ("--slots", "7")


async def test_loads_that_change_are_even_after_two_rounds(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zipf 1.0 on 4 servers, other ranks in each round."""
    async with Fleet(small_model, tmp_path) as fleet:
        servers = [await fleet.start(experts, options=OPTIONS) for experts in ("0-3", "4-7", "8-11", "12-15")]
        named = [server.address for server in servers]

        async def rebalance(*options: str) -> str:
            capsys.readouterr()
            assert await asyncio.to_thread(main, ["rebalance", *named, *SLOTS, "--over", "1", *options]) == 0
            return capsys.readouterr().out

        said = []
        async with CheckedLoad(named, small_model) as load:
            for number in range(ROUNDS):
                load.cases = make_cases(small_model, number, sizes=(48,), zipf=1.0)
                await load.answered(CALLS)
                said += [
                    line for _ in range(2) for line in (await rebalance("--apply")).splitlines() if "balanced" in line
                ]
                told: dict[str, Any] = json.loads(await rebalance("--json"))
                assert told["balancedness"]["before"] > 0.9, said
            await load.answered(CALLS)
        with capsys.disabled():
            print("", *said, sep="\n")
            hold(load.report, f"{ROUNDS} loads", ROUNDS * CALLS)
        assert load.report.failed == 0
