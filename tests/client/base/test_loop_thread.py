"""Threads that hand work to an event loop's own one, up to its end."""

import asyncio
import subprocess
import sys
import threading

from expertd.client.base.loop_thread import LoopThread

FORKING = """
import asyncio, os, signal
from expertd.client.base.loop_thread import LoopThread

loop = LoopThread("forks")
if (child := os.fork()) == 0:
    signal.alarm(30)
    try:
        loop.wait(asyncio.sleep(0))
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
loop.wait(asyncio.sleep(0))
loop.close()
"""


async def forever() -> None:
    await asyncio.Event().wait()


def test_what_comes_while_it_ends_is_refused_rather_than_forgotten() -> None:
    loop = LoopThread("ends")
    refusals: list[str] = []

    def come_late() -> None:
        for late in (lambda: loop.soon(print), lambda: loop.start(forever()), lambda: loop.wait(forever())):
            try:
                late()
            except RuntimeError as error:
                refusals.append(str(error))

    async def lasts() -> None:
        try:
            await forever()
        finally:
            # Cancelled, because the loop ends.
            thread = threading.Thread(target=come_late, daemon=True)
            thread.start()
            thread.join(5)

    last = loop.start(lasts())
    loop.close()
    assert last.cancelled()
    assert refusals == ["the event loop was closed by another thread"] * 3


def test_a_forked_process_is_told_what_to_do() -> None:
    done = subprocess.run((sys.executable, "-c", FORKING), capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("before this process was forked; connect after the fork")
