"""Full load for a long time: memory and descriptors stay what they are."""

import asyncio
import os
from pathlib import Path

from tests.chaos.fleet import Fleet, ServerProcess
from tests.chaos.load import CheckedLoad
from tests.chaos.scale import hold, scaled

SECONDS = scaled(1800.0, 8.0)
WARM_UP = scaled(60.0, 4.0)
"""Before the first look: allocators, thread pools and connections settle."""
MOST_GROWTH = 50 << 20


async def test_memory_and_descriptors_do_not_grow(small_model: Path, tmp_path: Path) -> None:
    async with Fleet(small_model, tmp_path) as fleet:
        servers = [await fleet.start(experts) for experts in ("0-7", "0-7", "8-15", "8-15")]
        load = CheckedLoad([server.address for server in servers], small_model)
        async with load:
            await asyncio.sleep(WARM_UP)
            before = [looks(server) for server in servers]
            await asyncio.sleep(SECONDS)
            after = [looks(server) for server in servers]
        growth = [late[0] - early[0] for early, late in zip(before, after, strict=True)]
        files = [late[1] - early[1] for early, late in zip(before, after, strict=True)]
        hold(load.report, f"soak, {SECONDS:g} s", int(SECONDS))
        print(
            f"RSS {[early[0] >> 20 for early in before]} MB, growth {[grown >> 10 for grown in growth]} KB,"
            f" descriptors {[early[1] for early in before]}, more {files}, on {os.cpu_count()} cores"
        )
        assert load.report.failed == 0
        assert max(growth) <= MOST_GROWTH
        assert max(files) <= 0


def looks(server: ServerProcess) -> tuple[int, int]:
    return server.rss(), server.descriptors()
