"""Weights that are replaced while all servers are called: no sum mixes two generations, and no call fails."""

import asyncio
import contextlib
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.client.coordinator import Coordinator
from expertd.client.placement.admin import release_weights, share_calls, update_weights
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.ledger import Ledger
from expertd.proto.base.errors import ExpertdError
from tests.chaos.fleet import Fleet, ServerProcess
from tests.chaos.load import CONFIG, Case, is_right, make_cases
from tests.chaos.moves.administered import ADMIN, look
from tests.chaos.scale import scaled
from tests.support.families import SMALL
from tests.support.fence.wrong import wrong

SWITCHES, KILLS, ROLLOUTS = scaled(100, 20), scaled(20, 3), scaled(20, 1)
CALLERS, CALLS = 4, 6
PLAIN = ClientSecurity()
DIFFERENT = 0.1
"""Relative error between generations, and between each of them and any sum that mixes them."""


class GenerationLoad:
    """Callers who know the answers of each generation, and which one a call says that it used."""

    def __init__(self, addresses: Sequence[str], models: dict[str, Path]) -> None:
        """`models` are folders by fingerprint."""
        self.coordinator = Coordinator(addresses, CONFIG)
        cases = {fingerprint: make_cases(folder, 0) for fingerprint, folder in models.items()}
        self._cases: list[tuple[Case, dict[str, Case]]] = [
            (case, {fingerprint: theirs[number] for fingerprint, theirs in cases.items()})
            for number, case in enumerate(next(iter(cases.values())))
        ]
        for case, right in self._cases:
            assert all(one is case or relative_error(one.right, case.right) > DIFFERENT for one in right.values())
        self.used: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._stopping = False
        self._running: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "GenerationLoad":
        await self.coordinator.connect()
        self._running = [asyncio.create_task(self._caller(number)) for number in range(CALLERS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._running)
        await self.coordinator.close()

    async def answered(self, calls: int = CALLS) -> None:
        wanted = self.calls + calls
        async with asyncio.timeout(60):
            while self.calls < wanted:
                await asyncio.sleep(0.005)

    async def uses(self, fingerprint: str) -> None:
        """Wait until every call uses these weights."""
        async with asyncio.timeout(60):
            while True:
                before = Counter(self.used)
                await self.answered(2 * CALLERS)
                if set(self.used - before) == {fingerprint}:
                    return

    @property
    def calls(self) -> int:
        return self.used.total() + len(self.wrong)

    async def _caller(self, number: int) -> None:
        while not self._stopping:
            number += 1
            case, right = self._cases[number % len(self._cases)]
            began = time.monotonic()
            try:
                result = await self.coordinator.execute(
                    case.layer, case.hidden, topk_ids=case.ids, topk_weights=case.weights
                )
            except Exception as error:
                self.wrong.append(f"after {time.monotonic() - began:.2f} s: {error!r}")
                await asyncio.sleep(0.01)
                continue
            off = relative_error(result.output, right[result.model_fingerprint].right)
            if is_right(off):
                self.used[result.model_fingerprint] += 1
            else:
                self.wrong.append(wrong(f"error {off:.2e} from what {result.model_fingerprint} makes of it"))


@pytest.fixture(scope="module")
def models(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders of one shape, by fingerprint."""
    other = write_demo_checkpoint(tmp_path_factory.mktemp("next"), replace(SMALL, seed=SMALL.seed + 1))
    named = {}
    for folder in (small_model, other):
        with Checkpoint(folder) as checkpoint:
            named[Ledger(checkpoint).fingerprint] = folder
    return named


async def stage(server: ServerProcess, folder: Path) -> None:
    async for _ in update_weights(server.admin, PLAIN, (await look(server)).placement_epoch, str(folder)):
        pass


async def share(server: ServerProcess, fingerprint: str, wanted: float) -> None:
    await share_calls(server.admin, PLAIN, (await look(server)).placement_epoch, fingerprint, wanted)


async def release(server: ServerProcess, fingerprint: str) -> None:
    await release_weights(server.admin, PLAIN, (await look(server)).placement_epoch, fingerprint)


async def test_generations_are_switched_under_load_and_no_sum_mixes_them(
    models: dict[str, Path], tmp_path: Path
) -> None:
    former, new = models
    async with Fleet(models[former], tmp_path) as fleet:
        servers = [await fleet.start(experts, options=ADMIN) for experts in ("0-3", "4-7", "8-11", "12-15")]
        async with GenerationLoad([server.address for server in servers], models) as load:
            await load.answered()
            for number in range(SWITCHES):
                for server in servers:
                    await stage(server, models[new])
                    await load.answered(1)
                for server in servers:
                    assert set(load.used) <= {former} or number
                    await share(server, new, 1.0)
                await load.uses(new)
                for server in servers:
                    await release(server, former)
                former, new = new, former
            await load.uses(former)
        print(f"{SWITCHES} switches: {load.calls} calls, {dict(load.used)}, wrong: {load.wrong[:3]}")
        assert load.wrong == []
        assert min(load.used.values()) >= SWITCHES / 2 * CALLS
        assert [(await look(server)).fingerprints for server in servers] == [(former,)] * len(servers)


async def test_a_share_of_calls_tries_the_next_generation_and_goes_back(
    models: dict[str, Path], tmp_path: Path
) -> None:
    former, new = models
    async with Fleet(models[former], tmp_path) as fleet:
        servers = [await fleet.start(experts, options=ADMIN) for experts in ("0-7", "8-15")]
        async with GenerationLoad([server.address for server in servers], models) as load:
            for server in servers:
                await stage(server, models[new])
            # One of them alone makes nobody use it.
            await share(servers[0], new, 0.5)
            await load.answered(20)
            assert load.used[new] == 0
            await share(servers[1], new, 0.5)
            async with asyncio.timeout(60):
                while not load.used[new]:
                    await load.answered(1)
            before = Counter(load.used)
            await load.answered(60)
            during = load.used - before
            for server in servers:
                await share(server, new, 0.0)
            await load.uses(former)
        assert load.wrong == []
        assert 0.1 < during[new] / during.total() < 0.9


async def test_a_kill_in_the_middle_leaves_one_generation(models: dict[str, Path], tmp_path: Path) -> None:
    """Servers that are killed while they read, between the switches of two of them, and after it."""
    former, new = models
    chance = random.Random(5)
    async with Fleet(models[former], tmp_path) as fleet:
        servers = [await fleet.start(experts, options=ADMIN) for experts in ("0-7", "0-7", "8-15", "8-15")]
        async with GenerationLoad([server.address for server in servers], models) as load:
            for number in range(KILLS):
                for server in servers:
                    if (await look(server)).next is None:
                        await stage(server, models[new])
                victim = chance.randrange(len(servers))
                if number % 3 == 0:
                    await share(servers[victim], new, 1.0)
                elif number % 3 == 1:
                    for server in servers:
                        await share(server, new, 1.0)
                    await load.uses(new)
                else:
                    await release(servers[victim], new)
                    staging = asyncio.ensure_future(stage(servers[victim], models[new]))
                    await asyncio.sleep(chance.uniform(0, 0.1))
                servers[victim].signal(signal.SIGKILL)
                await servers[victim].exit_code()
                if number % 3 == 2:
                    with contextlib.suppress(ExpertdError):
                        await asyncio.wait_for(staging, 20)
                await load.uses(new if number % 3 == 1 else former)
                for server in servers:
                    if server is not servers[victim]:
                        await share(server, new, 0.0)
                servers[victim] = await fleet.restart(servers[victim], options=ADMIN)
                await load.uses(former)
        print(f"{KILLS} kills: {load.calls} calls, wrong: {load.wrong[:3]}")
        assert load.wrong == []


async def test_a_rollout_that_is_killed_anywhere_is_taken_up_again(models: dict[str, Path], tmp_path: Path) -> None:
    former, new = models
    async with Fleet(models[former], tmp_path) as fleet:
        servers = [await fleet.start(experts, options=ADMIN) for experts in ("0-3", "4-7", "8-11", "12-15")]
        addresses = [server.address for server in servers]

        async def rollout(*options: str, lines: int | None = None) -> int | None:
            """Its exit code; killed after so many lines where that is given."""
            command = (sys.executable, "-u", "-m", "expertd.cli", "rollout", *addresses, *options)
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            assert process.stdout is not None
            for _ in range(lines or 0):
                await process.stdout.readline()
            if lines is not None:
                process.kill()
            await process.communicate()
            return process.returncode

        async with GenerationLoad(addresses, models) as load:
            for number in range(ROLLOUTS):
                assert await rollout("--model", str(models[new]), lines=(number + 2) % 5) == -signal.SIGKILL
                await load.answered()
                assert await rollout("--model", str(models[new])) == 0
                await load.uses(new)
                assert await rollout("--release") == 0
                former, new = new, former
        print(f"{ROLLOUTS} killed roll-outs: {load.calls} calls, wrong: {load.wrong[:3]}")
        assert load.wrong == []
        assert [(await look(server)).fingerprints for server in servers] == [(former,)] * len(servers)
