"""Messages over a stream socket."""

import asyncio
import socket

from expertd.proto.lane.frames import AnswerFrames, Frames

REQUESTS = 20_000
MESSAGE = bytes(100)


async def connect(frames: Frames, end: socket.socket) -> None:
    end.setblocking(False)
    await asyncio.get_running_loop().create_unix_connection(lambda: frames, sock=end)


async def test_an_end_that_asks_and_one_that_answers_never_wait_for_each_other() -> None:
    answered = 0
    all_answered = asyncio.Event()

    def count(_: bytes) -> None:
        nonlocal answered
        answered += 1
        if answered == REQUESTS:
            all_answered.set()

    asking = AnswerFrames(count, lambda _: None)
    answering = Frames(lambda message: answering.send(message), lambda _: None)
    here, there = socket.socketpair()
    await connect(asking, here)
    await connect(answering, there)
    # More than the buffers of both directions hold.
    for _ in range(REQUESTS):
        asking.send(MESSAGE)
    async with asyncio.timeout(20):
        await all_answered.wait()
    asking.close()
    answering.close()
