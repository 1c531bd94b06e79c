"""Callers in processes of their own, which begin at once."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Sequence
from subprocess import PIPE


async def until_all_are_ready() -> None:
    """By a worker: waits until the others are ready, too."""
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)


async def at_once(module: str, workers: Iterable[Sequence[object]]) -> list[bytes]:
    """The line that each prints at its end, of workers `python -m MODULE --worker ARGUMENTS...`."""
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, "--worker", *map(str, arguments)), stdin=PIPE, stdout=PIPE
        )
        for arguments in workers
    ]
    pipes = [(process.stdin, process.stdout) for process in processes if process.stdin and process.stdout]
    for _, out in pipes:
        await out.readline()
    for into, _ in pipes:
        into.write(b"\n")
    lines = [await out.readline() for _, out in pipes]
    for process in processes:
        await process.wait()
    return lines
