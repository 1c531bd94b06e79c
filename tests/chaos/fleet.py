"""Real server processes, forked from a parent that has imported everything: one is ready in a tenth of a second."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Self

from expertd.server.failpoints import VARIABLE

OPTIONS = ("--backend", "torch", "--threads", "1", "--drain-seconds", "20")
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ("expertd.cli", "expertd.server.serve")
FORKS.set_forkserver_preload([*PRELOADED])


@dataclass(slots=True)
class ServerProcess:
    """One server and how to ill-treat it."""

    process: ForkServerProcess
    experts: str
    address: str
    metrics_url: str
    log: Path
    admin: str = ""
    """Where its administration is, if it has any."""

    def signal(self, number: signal.Signals) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            # It may end by itself meanwhile.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    async def exit_code(self, timeout: float = 30.0) -> int:
        """Wait for the end. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout):
            while self.process.is_alive():
                await asyncio.sleep(0.005)
        self.process.join()
        return self.process.exitcode if self.process.exitcode is not None else -1

    def strikes(self) -> int:
        """How often failpoints have struck."""
        return self.log.read_text(errors="replace").count(" strikes\n")

    def rss(self) -> int:
        """Resident bytes."""
        return self._memory("VmRSS")

    def peak(self) -> int:
        """Most bytes that were ever resident, or since `forget_peak`, without memory that is shared with callers."""
        return self._memory("VmHWM") - self._memory("RssShmem")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def _memory(self, name: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10

    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


class Fleet:
    """Servers of one model on loopback; all are ended by force at the end."""

    def __init__(self, model: Path, folder: Path) -> None:
        """`folder` takes logs and ready files."""
        self._model = model
        self._folder = folder
        self._numbers = itertools.count()
        self._processes: list[ForkServerProcess] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    async def start(
        self,
        experts: str,
        *,
        address: str = "127.0.0.1:0",
        faults: str = "",
        options: Sequence[str] = (),
        model: Path | None = None,
        log: Path | None = None,
    ) -> ServerProcess:
        """A server, ready; of the fleet's model with a log of its own, unless told otherwise. Raises `TimeoutError`."""
        number = next(self._numbers)
        ready, log = self._folder / f"{number}.json", log or self._folder / f"{number}.log"
        arguments = [
            *("serve", "--model", str(model or self._model), "--experts", experts),
            *("--listen", address, "--metrics", "127.0.0.1:0", "--ready-file", str(ready)),
            *(*OPTIONS, *options),
        ]
        process = FORKS.Process(target=_serve, args=(arguments, faults, log), daemon=True)
        process.start()
        self._processes = [other for other in self._processes if other.is_alive()] + [process]
        deadline = time.monotonic() + 60
        while not ready.exists():
            if not process.is_alive() or time.monotonic() > deadline:
                raise TimeoutError(f"server {number} is not ready: {log.read_text(errors='replace')[-2000:]}")
            await asyncio.sleep(0.005)
        bound = json.loads(ready.read_text())
        return ServerProcess(
            process, experts, bound["listen"], f"http://{bound['metrics']}/metrics", log, bound.get("admin", "")
        )

    async def restart(self, server: ServerProcess, faults: str = "", options: Sequence[str] = ()) -> ServerProcess:
        """Another server in the place of one that has ended."""
        return await self.start(server.experts, address=server.address, faults=faults, options=options)


def _end_with_the_tests() -> None:
    """However they end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _serve(arguments: list[str], faults: str, log: Path) -> None:
    """The life of the forked process."""
    from expertd import cli

    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ[VARIABLE] = faults
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    sys.exit(cli.main(arguments))
