"""How each kind of fault is done, and undone when its time is over."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from tests.chaos.composed.schedule import ON_DISCOVERY, ON_SHARD, Fault
from tests.chaos.composed.stage import Place, Stage
from tests.chaos.fleet import ServerProcess
from tests.support.wire import Direction

LATE_SECONDS = 0.15
STUTTER_SECONDS = 0.2
"""Of each stop and of each cut of what flaps, and between two of them."""
Done = AsyncIterator[None]
OnPlace = Callable[[Place, Stage], AbstractAsyncContextManager[None]]


@contextlib.asynccontextmanager
async def kill(place: Place, _: Stage) -> Done:
    await place.clear(signal.SIGKILL)
    yield
    await place.fill()


@contextlib.asynccontextmanager
async def drain(place: Place, _: Stage) -> Done:
    await place.clear(signal.SIGTERM)
    yield
    await place.fill()


@contextlib.asynccontextmanager
async def other_model(place: Place, stage: Stage) -> Done:
    """A server of the other generation is in its place."""
    models = stage.models
    await place.clear(signal.SIGTERM)
    await place.fill(model=models.second if models.of(place.shard) == models.first else models.first)
    yield
    await place.clear(signal.SIGTERM)
    await place.fill()


@contextlib.asynccontextmanager
async def unread_log(place: Place, _: Stage) -> Done:
    await place.clear(signal.SIGTERM)
    with place.unread_log() as log:
        await place.fill(log=log)
        yield
        await place.clear(signal.SIGTERM)
    await place.fill()


@contextlib.asynccontextmanager
async def freeze(place: Place, _: Stage) -> Done:
    server = place.server
    if server is not None:
        server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if server is not None:
            server.signal(signal.SIGCONT)


@contextlib.asynccontextmanager
async def stutter(place: Place, stage: Stage) -> Done:
    """It stands still every few hundred milliseconds."""
    async with _again_and_again(lambda: freeze(place, stage)):
        yield


@contextlib.asynccontextmanager
async def few_files(place: Place, _: Stage) -> Done:
    """It can open nothing else."""
    async with _limited(place.server, resource.RLIMIT_NOFILE, 3):
        yield


@contextlib.asynccontextmanager
async def full_disk(place: Place, _: Stage) -> Done:
    """Neither its log nor its ready file can be written."""
    async with _limited(place.server, resource.RLIMIT_FSIZE, 0):
        yield


@contextlib.asynccontextmanager
async def no_requests(place: Place, _: Stage) -> Done:
    async with _silent(place, "requests"):
        yield


@contextlib.asynccontextmanager
async def no_replies(place: Place, _: Stage) -> Done:
    async with _silent(place, "replies"):
        yield


@contextlib.asynccontextmanager
async def late_wire(place: Place, _: Stage) -> Done:
    for wire in place.wires:
        wire.delay = LATE_SECONDS
    yield
    for wire in place.wires:
        wire.delay = 0.0


@contextlib.asynccontextmanager
async def cut(place: Place, _: Stage) -> Done:
    async with place.tcp.cut(), place.unix.cut():
        yield


@contextlib.asynccontextmanager
async def flap(place: Place, stage: Stage) -> Done:
    async with _again_and_again(lambda: cut(place, stage)):
        yield


@contextlib.asynccontextmanager
async def loss(shard: str, stage: Stage) -> Done:
    """All replicas of a shard at once."""
    places = [place for place in stage.places.values() if place.shard == shard]
    await asyncio.gather(*(place.clear(signal.SIGKILL) for place in places))
    yield
    await asyncio.gather(*(place.fill() for place in places))


@contextlib.asynccontextmanager
async def bad_list(kind: str, coordinator: str, stage: Stage) -> Done:
    """What a coordinator reads its servers from is not what it should be."""
    file = stage.servers_file(coordinator)
    if kind == "shorter_file":
        stage.list_servers(coordinator, without=stage.plan.mortal[0])
    elif kind == "garbage_file":
        file.write_bytes(b"\xff\x00 no server\n")
    elif kind == "empty_file":
        file.write_text("")
    else:
        _away(file, folder=kind == "folder_for_file")
    yield
    if file.is_dir():
        file.rmdir()
    stage.list_servers(coordinator)


ON_PLACE: dict[str, OnPlace] = {
    function.__name__: function
    for function in (
        *(kill, drain, other_model, unread_log, freeze, stutter, few_files, full_disk),
        *(no_requests, no_replies, late_wire, cut, flap),
    )
}


def befall(fault: Fault, stage: Stage) -> AbstractAsyncContextManager[None]:
    """It has happened inside the block, and is undone after it."""
    if fault.kind in ON_DISCOVERY:
        return bad_list(fault.kind, fault.victim, stage)
    if fault.kind in ON_SHARD:
        return loss(fault.victim, stage)
    return ON_PLACE[fault.kind](stage.places[fault.victim], stage)


def harmed(fault: Fault, stage: Stage) -> tuple[str, ...]:
    """Places whose servers may not answer because of it."""
    if fault.kind == "shorter_file":
        return stage.plan.mortal[:1]
    if fault.kind in ON_DISCOVERY:
        return ()
    if fault.kind in ON_SHARD:
        return tuple(name for name, place in stage.places.items() if place.shard == fault.victim)
    return (fault.victim,)


def _away(file: Path, *, folder: bool) -> None:
    file.unlink()
    if folder:
        file.mkdir()


@contextlib.asynccontextmanager
async def _silent(place: Place, direction: Direction) -> Done:
    with place.tcp.silent(direction), place.unix.silent(direction):
        yield


@contextlib.asynccontextmanager
async def _limited(server: ServerProcess | None, which: int, least: int) -> Done:
    """`server` has a limit of a process lowered, as long as it lives."""
    process = server.process.pid if server is not None and server.process.is_alive() else None
    if process is None:
        yield
        return
    before = resource.prlimit(process, which)
    resource.prlimit(process, which, (least, before[1]))
    yield
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process, which, before)


@contextlib.asynccontextmanager
async def _again_and_again(fault: Callable[[], AbstractAsyncContextManager[None]]) -> Done:
    async def repeat() -> None:
        while True:
            async with fault():
                await asyncio.sleep(STUTTER_SECONDS)
            await asyncio.sleep(STUTTER_SECONDS)

    repeating = asyncio.create_task(repeat())
    yield
    repeating.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await repeating
