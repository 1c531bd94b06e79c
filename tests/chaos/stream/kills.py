"""Servers that are killed, frozen and drained while a GPU's stream waits for them, and what becomes of its calls.

    python -m tests.chaos.stream.kills MODEL [--blows 200] [--device cuda]

Without a GPU the kernels run in Triton's interpreter. Servers compute on the CPU; each owner has a replica.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tests.support.kernels.interpreted  # noqa: F401
from expertd.client.sync import SyncCoordinator
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import ExpertdError
from tests.chaos.fleet import Fleet
from tests.chaos.load import TOLERANCE
from tests.support.coordinators import EXACT, LAYER, oracle, routing, tokens
from tests.support.fence.wrong import wrong

SHARDS = ("0-7", "0-7", "8-15", "8-15")
BLOWS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
TIMEOUT = 0.6
"""Seconds after which a server that has not answered is given up."""
MOST_TOKENS = 4
CALLS = 12
"""That are right between two blows, however fast the machine interprets kernels."""


@dataclass
class Report:
    """Of calls that were checked, each on its own."""

    right: int = 0
    failed: int = 0
    wrong: list[str] = field(default_factory=list)
    """Sums that were used, as no error came with them, and are not right."""
    longest: float = 0.0
    """Seconds for which the stream held a call."""
    messages: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{self.right} right, {self.failed} failed, {len(self.wrong)} wrong; longest {self.longest:.3f} s"


class Caller(threading.Thread):
    """Calls on the stream, one after another, until it is stopped."""

    def __init__(self, model: Path, addresses: Sequence[str], device: str) -> None:
        super().__init__(daemon=True)
        self.report = Report()
        self.stopped = threading.Event()
        self.ready = threading.Event()
        self._addresses, self._device = addresses, device
        self._cases = []
        for seed, count in enumerate((1, 2, MOST_TOKENS)):
            case = tokens(count, seed).float(), *routing(count, seed)
            self._cases.append((tuple(part.to(device) for part in case), oracle(model, *case)))

    def run(self) -> None:
        with SyncCoordinator(self._addresses, EXACT) as moe:
            moe.prepare_stream(MOST_TOKENS, self._device, timeout=TIMEOUT)
            self._membership = moe._coordinator._connected().membership
            self.ready.set()
            while not self.stopped.is_set():
                self._call(moe)

    @property
    def uses_all(self) -> bool:
        """Whether every server is used again: each owner has a replica."""
        return all(member.in_use for member in self._membership.members.values())

    def _call(self, moe: SyncCoordinator) -> None:
        case, right = random.choice(self._cases)
        report = self.report
        try:
            begun = time.monotonic()
            output = moe.on_stream(LAYER, *case).cpu()
            report.longest = max(report.longest, time.monotonic() - begun)
            moe.check()
        except ExpertdError as error:
            report.failed += 1
            report.messages.add(str(error))
            return
        off = relative_error(output, right)
        if off < TOLERANCE:
            report.right += 1
        else:
            report.wrong.append(wrong(f"relative error {off}"))


async def strike(model: Path, folder: Path, blows: int, device: str, seed: int = 0) -> Report:
    """Blows at random moments, each followed by a new start of the server that it hit."""
    chance = random.Random(seed)
    async with Fleet(model, folder) as fleet:
        servers = [await fleet.start(experts) for experts in SHARDS]
        caller = Caller(model, [server.address for server in servers], device)
        caller.start()
        await asyncio.to_thread(caller.ready.wait, 60)
        for number in range(blows):
            place = chance.randrange(len(servers))
            await asyncio.sleep(chance.uniform(0.05, 0.5))
            servers[place].signal(chance.choice(BLOWS))
            await asyncio.sleep(chance.uniform(0.0, 1.0))
            servers[place].signal(signal.SIGKILL)
            await servers[place].exit_code()
            servers[place] = await fleet.restart(servers[place])
            await _until_calls_go_on(caller)
            if number % 20 == 19:
                print(f"{number + 1} blows: {caller.report}", flush=True)
        caller.stopped.set()
        await asyncio.to_thread(caller.join, 30)
        assert not caller.is_alive(), "the caller still waits"
    return caller.report


async def _until_calls_go_on(caller: Caller) -> None:
    before, deadline = caller.report.right, time.monotonic() + 30
    while caller.report.right < before + CALLS or not caller.uses_all:
        assert time.monotonic() < deadline, f"no call is answered any more: {caller.report}"
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--blows", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = asyncio.run(strike(arguments.model, Path(scratch), arguments.blows, arguments.device, arguments.seed))
    print(outcome)
    assert not outcome.wrong
    assert outcome.longest < 1.0
