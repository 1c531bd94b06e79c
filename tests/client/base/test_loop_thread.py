"""Threads that hand work to an event loop's own one, up to its end."""

import asyncio
import threading

from expertd.client.base.loop_thread import LoopThread


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
