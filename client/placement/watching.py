"""Rounds that repeat, and a lock so that of several who rebalance one does at a time."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from expertd.proto.base.errors import ExpertdError, Unavailable


async def repeat(seconds: float, work: Callable[[], Awaitable[None]], tell: Callable[[Exception], None]) -> None:
    """Begin `work` every `seconds`, or when it ends where it takes longer; what goes wrong is told, and tried again."""
    while True:
        begun = time.monotonic()
        try:
            await work()
        except (ExpertdError, OSError, ValueError) as error:
            tell(error)
        await asyncio.sleep(max(0.0, begun + seconds - time.monotonic()))


@contextlib.contextmanager
def locked(file: Path | None) -> Iterator[None]:
    """Hold `file`, which is made where it is missing, if one is given. Raises `Unavailable` while another process does.

    The kernel lets go of it when this process ends, however it does.
    """
    if file is None:
        yield
        return
    with file.open("a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"another rebalance holds {file}; wait for its end") from None
        yield
