"""Where servers stand: each place has one server at a time, and wires in front of it that stay when it is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.sample import sampled_fingerprint
from expertd.proto.base.loopback import UNIX
from tests.chaos.composed.schedule import FAILPOINTS, NEXT, SHARDS, Plan, shard_of
from tests.chaos.fleet import Fleet, ServerProcess
from tests.support.wire import Wire

HURRIED = ("--device-timeout", "0.3")
"""For failpoints that have the device stick."""
NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class Models:
    """Two generations of one shape."""

    first: Path
    second: Path

    def of(self, shard: str) -> Path:
        return self.second if shard == NEXT else self.first


@cache
def fingerprint_of(model: Path) -> str:
    with Checkpoint(model) as checkpoint:
        return sampled_fingerprint(checkpoint)


class Place:
    """One server at a time, and how callers reach whichever it is."""

    def __init__(self, name: str, fleet: Fleet, models: Models, folder: Path) -> None:
        self.name = name
        self.shard = shard_of(name)
        self.tcp, self.unix = Wire(""), Wire("")
        self.server: ServerProcess | None = None
        self.strikes = 0
        """Of failpoints, by servers that are gone: in the end by all that had any."""
        self._fleet = fleet
        self._models = models
        self._folder = folder
        self._changing = asyncio.Lock()
        """Faults may overlap: two servers could start here, of which one is never ended and keeps its callers."""

    @property
    def wires(self) -> tuple[Wire, Wire]:
        return self.tcp, self.unix

    async def fill(self, *, failpoints: str = "", model: Path | None = None, log: Path | None = None) -> None:
        """Have a server here, if there is none."""
        async with self._changing:
            if self.server is not None:
                return
            socket = self._folder / f"{next(NUMBERS)}.sock"
            options = ("--unix-socket", str(socket), *(HURRIED if "stuck" in failpoints else ()))
            self.server = await self._fleet.start(
                SHARDS[self.shard],
                faults=failpoints,
                options=options,
                model=model or self._models.of(self.shard),
                log=log,
            )
            self.tcp.target, self.unix.target = self.server.address, f"{UNIX}{socket}"

    async def clear(self, number: signal.Signals) -> None:
        """End the server by a signal."""
        async with self._changing:
            server, self.server = self.server, None
            if server is not None:
                server.signal(number)
                # One that is frozen hears nothing else.
                server.signal(signal.SIGCONT)
                await server.exit_code()
                self.strikes += server.strikes() if server.log.is_file() else 0

    @contextlib.contextmanager
    def unread_log(self) -> Iterator[Path]:
        """A full pipe to log to, which nobody reads."""
        path = self._folder / f"{next(NUMBERS)}.pipe"
        os.mkfifo(path)
        pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            size = fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
            os.write(pipe, b"x" * size)
            yield path
        finally:
            os.close(pipe)


class Stage:
    """The places of a plan, and the lists of servers that its coordinators read."""

    def __init__(self, plan: Plan, models: Models, folder: Path) -> None:
        self.plan = plan
        self.models = models
        self._folder = folder
        self._fleet = Fleet(models.first, folder)
        self._stack = AsyncExitStack()
        self.places = {name: Place(name, self._fleet, models, folder) for name in plan.places}

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._fleet)
        try:
            await asyncio.gather(*(self._open(place) for place in self.places.values()))
        except BaseException:
            await self._stack.aclose()
            raise
        for name in self.plan.coordinators:
            self.list_servers(name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _open(self, place: Place) -> None:
        await self._stack.enter_async_context(place.tcp.carrying())
        await self._stack.enter_async_context(place.unix.carrying(f"{UNIX}{self._folder}/{place.name}"))
        kind = self.plan.births.get(place.name)
        await place.fill(failpoints=f"{FAILPOINTS[kind]},seed={self.plan.seed}" if kind else "")

    def servers_file(self, coordinator: str) -> Path:
        return self._folder / f"{coordinator}.servers"

    def list_servers(self, coordinator: str, without: str = "") -> None:
        """Write what is right, but for one place."""
        places = [place for place in self.places.values() if place.name != without]
        wires = [place.unix if coordinator.startswith("unix") else place.tcp for place in places]
        file = self.servers_file(coordinator)
        beside = file.with_suffix(".new")
        beside.write_text("".join(f"{wire.address}\n" for wire in wires))
        beside.replace(file)

    async def mend(self) -> None:
        """A sound server in every place, and right lists."""
        await asyncio.gather(*(self.places[name].clear(signal.SIGTERM) for name in self.plan.births))
        for place in self.places.values():
            if place.server is not None and not place.server.process.is_alive():
                await place.clear(signal.SIGKILL)
        await asyncio.gather(*(place.fill() for place in self.places.values()))
