"""A front end's end of the link, with a stand-in for the server at the other."""

import asyncio
import contextlib
import mmap
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from expertd.proto import codec
from expertd.proto.base.errors import Overloaded, Unavailable
from expertd.proto.codec import ExecuteCall, ExecuteResult, RawRequest, StageTimings
from expertd.proto.lane.frames import Frames
from expertd.server.local.link import ANSWER, CALL, LOST_SECONDS, ServerLink, Settings
from expertd.server.options.config import ServerConfig
from tests.support.serving import ANY_PORT, random_batch, until

WIDTH = 256
BATCH = random_batch(4, hidden=WIDTH, experts=16, top_k=4)
ROOM = 8192
"""Bytes: one call's tensors fit, two calls' do not."""


def request_of(number: int) -> RawRequest:
    call = ExecuteCall(
        number, "model", None, 1, BATCH.hidden, BATCH.scales, BATCH.expert_ids, BATCH.weights, torch.float32
    )
    return codec.parse_request(codec.encode_call(call))


@dataclass
class Stand:
    """The server's end, which answers when it is told to."""

    link: ServerLink
    frames: Frames
    received: list[tuple[int, bool, RawRequest]]
    at_once: bool = False
    """Whether it answers as it reads."""

    def take(self, frame: bytes) -> None:
        number, shared, length = CALL.unpack_from(frame)
        request = codec.parse_request(frame[CALL.size + length :])
        if self.at_once:
            self.answer(number, request.request_id, torch.zeros(0 if shared else 4, WIDTH))
        else:
            self.received.append((number, shared, request))

    async def next(self) -> tuple[int, bool, RawRequest]:
        await until(lambda: bool(self.received))
        return self.received.pop(0)

    def answer(self, number: int, request_id: int, partials: torch.Tensor) -> None:
        result = ExecuteResult(request_id, partials, {}, StageTimings())
        self.frames.send(ANSWER.pack(number) + codec.encode_result(result))


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[Stand]:
    ours, theirs = socket.socketpair()
    config = ServerConfig(model=Path(), experts=(0,), listen=ANY_PORT, front_ends=1)
    link = ServerLink(mmap.mmap(-1, ROOM), Settings(config, ANY_PORT, "", WIDTH, 1 << 20))
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


def call(stand: Stand, number: int) -> asyncio.Task[bytes]:
    return asyncio.create_task(stand.link.call(request_of(number), "someone"))


async def test_a_cancelled_calls_place_is_the_servers_until_it_answers() -> None:
    async with linked() as stand:
        given_up = call(stand, 1)
        first, shared, request = await stand.next()
        assert (shared, request.segment_offset, len(request.hidden)) == (True, 0, 0)
        given_up.cancel()
        number, _, cancellation = await stand.next()
        assert (number, cancellation.cancels) == (first, 1)

        other = call(stand, 2)
        number, shared, request = await stand.next()
        assert (shared, len(request.hidden)) == (False, 4 * WIDTH)
        partials = torch.randn(4, WIDTH)
        stand.answer(number, 2, partials)
        result = codec.decode_result(codec.parse_response(await other), 4, WIDTH, torch.float32)
        assert torch.equal(result.partials, partials)

        assert not given_up.done()
        stand.answer(first, 1, torch.empty(0))
        with pytest.raises(asyncio.CancelledError):
            await given_up
        third = call(stand, 3)
        _, shared, request = await stand.next()
        assert (shared, request.segment_offset) == (True, 0)
        third.cancel()


async def test_errors_are_raised_with_their_delay_and_give_the_place_back() -> None:
    async with linked() as stand:
        for _ in range(3):
            refused = call(stand, 1)
            number, shared, _ = await stand.next()
            assert shared
            stand.frames.send(ANSWER.pack(number) + codec.encode_error(1, Overloaded("full", retry_after=0.25)))
            with pytest.raises(Overloaded, match="full") as error:
                await refused
            assert error.value.retry_after == 0.25


async def test_without_a_server_nobody_waits() -> None:
    async with linked() as stand:
        waiting = call(stand, 1)
        await stand.next()
        stand.frames.close()
        for later in (waiting, call(stand, 2)):
            with pytest.raises(Unavailable, match="the connection between front end and server was closed"):
                await later
        assert await stand.link.draining == LOST_SECONDS


async def test_two_full_buffers_do_not_stop_the_link() -> None:
    async with linked() as stand:
        stand.at_once = True
        _, waiting = await asyncio.wait([call(stand, number) for number in range(1, 3000)], timeout=20)
        assert not waiting
