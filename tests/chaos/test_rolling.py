"""Draining and restarting all servers, one after another, under load."""

import signal
import time
from pathlib import Path

from tests.chaos.fleet import Fleet
from tests.chaos.load import CheckedLoad
from tests.chaos.scale import hold, scaled

ROUNDS = scaled(50, 2)
CALLS = 5


async def test_a_rolling_restart_is_not_noticed(small_model: Path, tmp_path: Path) -> None:
    async with Fleet(small_model, tmp_path) as fleet:
        servers = [await fleet.start(experts) for experts in ("0-7", "0-7", "8-15", "8-15")]
        load = CheckedLoad([server.address for server in servers], small_model)
        exit_codes = []
        async with load:
            for _ in range(ROUNDS):
                for place, server in enumerate(servers):
                    server.signal(signal.SIGTERM)
                    exit_codes.append(await server.exit_code())
                    servers[place] = await fleet.restart(server)
                    await load.uses(server.address, since=time.monotonic())
                    await load.answered(CALLS)
        hold(load.report, f"rolling restart, {ROUNDS} rounds of {len(servers)}", ROUNDS * 4 * CALLS)
        assert load.report.failed == 0
        assert exit_codes == [0] * ROUNDS * 4
