"""A front end's end of the link, with a stand-in for the server at the other."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from expertd.proto import codec
from expertd.proto.base.errors import Cancelled, Overloaded, Unavailable
from expertd.proto.codec import ExecuteCall, ExecuteResult, StageTimings
from expertd.proto.lane.frames import Frames
from expertd.server.local.front_ends import _Link
from expertd.server.local.link import ANSWER, CALL, LOST_SECONDS, ServerLink, Settings
from expertd.server.options.config import ServerConfig
from expertd.server.rpc.incoming import Call, Incoming
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


class Pending:
    """An executor whose calls are answered by the test."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def submit(self, incoming: Incoming) -> Call:
        number = codec.parse_request(incoming.message).request_id
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.calls.append(Call(number, None, answer, lambda: None))
        return self.calls[-1]


async def test_a_cancellation_that_crosses_its_answer_changes_nothing() -> None:
    executor = Pending()
    async with linked() as stand:
        server = _Link(executor, 1 << 21, lambda: None)
        stand.take = server._on_frame  # type: ignore[method-assign]
        server.frames = stand.frames
        for request_id in (1, 2):
            number, answer = call(stand, request_id)
            await until(lambda expected=request_id: len(executor.calls) == expected)  # type: ignore[misc]
            # At once after the server has sent its answer, which nobody has read by then.
            crossing = partial(lambda its, _: stand.link.cancel(its), number)
            executor.calls[-1].answer.add_done_callback(crossing)
            result = ExecuteResult(request_id, torch.zeros(4, WIDTH), {}, StageTimings())
            executor.calls[-1].answer.set_result(encode_result(result))
            assert codec.parse_response(await answer).request_id == request_id
        assert len(executor.calls) == 2


async def test_an_answer_that_nobody_waits_for_is_ignored() -> None:
    async with linked() as stand:
        number, first = call(stand, 1)
        await stand.next()
        for _ in range(2):
            stand.answer(number, 1, torch.zeros(4, WIDTH))
        await first
        other, second = call(stand, 2)
        assert (await stand.next())[0] == other
        stand.answer(other, 2, torch.zeros(4, WIDTH))
        assert codec.parse_response(await second).request_id == 2


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
