"""Several server processes on this machine, started and stopped together: for the demo, benches and tests."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

EXIT_USAGE = 2


class ServerDied(Exception):
    """A server process ended or did not become ready; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Each:
    """What one server is given beside what all are."""

    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LocalServer:
    """One running server process."""

    process: asyncio.subprocess.Process
    address: str
    metrics_url: str
    log: Path


class LocalCluster:
    """Server processes on free loopback ports.

        async with LocalCluster(model, ["0-31", "32-63"]) as cluster:
            async with Coordinator(cluster.addresses) as moe: ...

    Leaving the block sends SIGTERM and waits for the drained exit.
    """

    def __init__(
        self,
        model: Path,
        shards: Sequence[str],
        options: Sequence[str] = (),
        start_timeout: float = 180.0,
        *,
        each: Callable[[int], Each] = lambda index: Each(),
    ) -> None:
        """One server for each of `shards` (as for --experts); `options` are further options of `expertd serve`, and
        `each` has those of one server."""
        self._model = model
        self._shards = shards
        self._options = options
        self._start_timeout = start_timeout
        self._each = each
        self._folder = tempfile.TemporaryDirectory(prefix="expertd-")
        self._processes: list[asyncio.subprocess.Process] = []
        self.servers: list[LocalServer] = []
        self.exit_codes: list[int] = []

    @property
    def addresses(self) -> list[str]:
        return [server.address for server in self.servers]

    async def __aenter__(self) -> Self:
        try:
            for index, experts in enumerate(self._shards):
                self._processes.append(await self._start(index, experts))
            deadline = time.monotonic() + self._start_timeout
            for index, process in enumerate(self._processes):
                self.servers.append(await self._until_ready(index, process, deadline))
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self, grace: float = 35.0) -> None:
        """End all servers, by force those that outlast `grace` seconds; `exit_codes` then has their codes."""
        for process in self._processes:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        self.exit_codes = list(await asyncio.gather(*(_reap(process, grace) for process in self._processes)))
        self._processes = []
        self._folder.cleanup()

    def progress(self) -> list[str]:
        """The newest line of each server's log, without its time."""
        logs = [self._log_file(index) for index in range(len(self._processes))]
        lines = [(log.read_text(errors="replace").splitlines() or ["starting"])[-1] for log in logs]
        return [line.partition(": ")[2] or line for line in lines]

    async def until_one_ends(self) -> LocalServer:
        """Wait for a server to end by itself, which it should not."""
        waiting = {asyncio.ensure_future(server.process.wait()): server for server in self.servers}
        try:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return waiting[done.pop()]
        finally:
            for one in waiting:
                one.cancel()

    async def _start(self, index: int, experts: str) -> asyncio.subprocess.Process:
        each = self._each(index)
        command = [
            # -P: the folder that the caller happens to be in is no place to import from.
            *(sys.executable, "-P", "-m", "expertd.cli", "serve"),
            *("--model", str(self._model), "--experts", experts),
            *("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"),
            *("--ready-file", str(self._ready_file(index))),
            *self._options,
            *each.options,
        ]
        with self._log_file(index).open("wb") as log:
            # A session of its own: Ctrl-C on the terminal reaches only the parent, which then drains the servers.
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | each.environment,
            )

    async def _until_ready(self, index: int, process: asyncio.subprocess.Process, deadline: float) -> LocalServer:
        ready = self._ready_file(index)
        while not ready.exists():
            if process.returncode is not None or time.monotonic() > deadline:
                state = "still starting" if process.returncode is None else f"exit code {process.returncode}"
                tail = tail_of(self._log_file(index))
                if process.returncode == EXIT_USAGE:
                    # Its last line says what it cannot use.
                    tail = "".join(tail.splitlines()[-1:])
                raise ServerDied(f"server {index} (experts {self._shards[index]}) is not ready: {state}\n{tail}")
            await asyncio.sleep(0.05)
        bound = json.loads(ready.read_text())
        return LocalServer(process, bound["listen"], f"http://{bound['metrics']}/metrics", self._log_file(index))

    def _ready_file(self, index: int) -> Path:
        return Path(self._folder.name) / f"server-{index}.json"

    def _log_file(self, index: int) -> Path:
        return Path(self._folder.name) / f"server-{index}.log"


def tail_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def even_shards(num_experts: int, servers: int) -> list[str]:
    """Expert ranges of equal size: 256 experts over 8 servers are 0-31, 32-63, ..."""
    if servers < 1 or num_experts % servers:
        raise ValueError(f"{num_experts} experts cannot be split evenly over {servers} servers")
    size = num_experts // servers
    return [f"{first}-{first + size - 1}" for first in range(0, num_experts, size)]


async def _reap(process: asyncio.subprocess.Process, grace: float) -> int:
    try:
        return await asyncio.wait_for(process.wait(), grace)
    except TimeoutError:
        process.kill()
        return await process.wait()
