"""A front end's end of the link, with a stand-in for the server at the other."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from expertd.proto import codec
from expertd.proto.base.errors import Cancelled, Overloaded, Unavailable
from expertd.proto.codec import ExecuteCall, ExecuteResult, StageTimings
from expertd.proto.lane.frames import Frames
from expertd.server.local.link import ANSWER, CALL, LOST_SECONDS, ServerLink, Settings
from expertd.server.options.config import ServerConfig
from tests.support.model.messages import encode_result
from tests.support.serving import ANY_PORT, random_batch, until

WIDTH = 256
BATCH = random_batch(4, hidden=WIDTH, experts=16, top_k=4)


def request_of(number: int) -> bytes:
    call = ExecuteCall(
        number, "model", None, 1, BATCH.hidden, BATCH.scales, BATCH.expert_ids, BATCH.weights, torch.float32
    )
    return codec.encode_call(call)


@dataclass
class Stand:
    """The server's end, which answers when it is told to."""

    link: ServerLink
    frames: Frames
    received: list[tuple[int, bytes]]
    at_once: bool = False
    """Whether it answers as it reads."""

    def take(self, frame: bytes) -> None:
        number, length = CALL.unpack_from(frame)
        message = frame[CALL.size + length :]
        if self.at_once:
            self.answer(number, codec.parse_request(message).request_id, torch.zeros(4, WIDTH))
        else:
            self.received.append((number, message))

    async def next(self) -> tuple[int, bytes]:
        await until(lambda: bool(self.received))
        return self.received.pop(0)

    def answer(self, number: int, request_id: int, partials: torch.Tensor) -> None:
        result = ExecuteResult(request_id, partials, {}, StageTimings())
        self.frames.send(ANSWER.pack(number) + encode_result(result))


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[Stand]:
    ours, theirs = socket.socketpair()
    config = ServerConfig(model=Path(), experts=(0,), listen=ANY_PORT, front_ends=1)
    link = ServerLink(Settings(config, ANY_PORT, "", 1 << 20))
    stand: Stand
    frames = Frames(lambda frame: stand.take(frame), lambda error: None, 1 << 21)
    stand = Stand(link, frames, [])
    await link.open(theirs)
    ours.setblocking(False)
    await asyncio.get_running_loop().create_unix_connection(lambda: frames, sock=ours)
    try:
        yield stand
    finally:
        frames.close()
        await link.draining


def call(stand: Stand, number: int) -> tuple[int, asyncio.Future[bytes]]:
    return stand.link.call(request_of(number), "someone", "identity")


async def test_a_cancelled_call_is_answered_by_the_server() -> None:
    async with linked() as stand:
        number, given_up = call(stand, 1)
        assert await stand.next() == (number, request_of(1))
        stand.link.cancel(number)
        assert await stand.next() == (number, b"")
        assert not given_up.done()
        stand.frames.send(ANSWER.pack(number) + codec.encode_error(1, Cancelled("given up")))
        with pytest.raises(Cancelled, match="given up"):
            await given_up
        stand.link.cancel(number)
        other, answer = call(stand, 2)
        assert await stand.next() == (other, request_of(2))
        partials = torch.randn(4, WIDTH)
        stand.answer(other, 2, partials)
        result = codec.decode_result(codec.parse_response(await answer), 4, WIDTH, torch.float32)
        assert torch.equal(result.partials, partials)


async def test_errors_are_raised_with_their_delay() -> None:
    async with linked() as stand:
        number, refused = call(stand, 1)
        await stand.next()
        stand.frames.send(ANSWER.pack(number) + codec.encode_error(1, Overloaded("full", retry_after=0.25)))
        with pytest.raises(Overloaded, match="full") as error:
            await refused
        assert error.value.retry_after == 0.25


async def test_without_a_server_nobody_waits() -> None:
    async with linked() as stand:
        _, waiting = call(stand, 1)
        await stand.next()
        stand.frames.close()
        await until(lambda: stand.link.lost)
        _, late = call(stand, 2)
        for later in (waiting, late):
            with pytest.raises(Unavailable, match="the connection between front end and server was closed"):
                await later
        assert await stand.link.draining == LOST_SECONDS


async def test_two_full_buffers_do_not_stop_the_link() -> None:
    async with linked() as stand:
        stand.at_once = True
        _, waiting = await asyncio.wait([call(stand, number)[1] for number in range(1, 3000)], timeout=20)
        assert not waiting
