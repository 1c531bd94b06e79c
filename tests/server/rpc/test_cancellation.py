"""Requests that their callers cancel, over a stream and over shared memory, as a stranger would by the contract."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from expertd.proto import expert_shard_pb2 as pb
from expertd.server.app import Server
from tests.support.local_caller import BATCH, Caller, accepted, over_grpc
from tests.support.serving import (
    Gate,
    count_of,
    execute_method,
    open_channel,
    random_batch,
    request_for,
    running_server,
    stream_method,
    until,
)

CANCELLED = grpc.StatusCode.CANCELLED.value[0]
SLOT_BYTES = 6400
"""More than BATCH takes, a multiple of 64."""


@dataclass
class Talk:
    """A stream or a local connection."""

    server: Server
    send: Callable[[pb.ExecuteRequest], Awaitable[object]]
    answer: Callable[[], Awaitable[pb.ExecuteResponse]]

    async def request(self, number: int, layer: int = 1) -> None:
        await self.send(request_for(self.server, BATCH, request_id=number, layer=layer))

    async def cancel(self, number: int) -> None:
        await self.send(pb.ExecuteRequest(request_id=2**40, cancels=number))

    async def refusal(self) -> tuple[int, int, str]:
        answer = await self.answer()
        return answer.request_id, answer.error.code, answer.error.message


@contextlib.asynccontextmanager
async def streaming(server: Server) -> AsyncIterator[Talk]:
    async with open_channel(server) as channel:
        stream: Any = stream_method(channel)()
        yield Talk(server, stream.write, stream.read)
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF


@contextlib.asynccontextmanager
async def sharing(server: Server) -> AsyncIterator[Talk]:
    async with accepted(server) as caller:

        async def send(request: pb.ExecuteRequest) -> None:
            if request.HasField("cancels"):
                caller.cancel(request.cancels)
            else:
                caller.send(place(caller, request))

        yield Talk(server, send, caller.answer)
        assert not caller.ended()


Opened: TypeAlias = Callable[[Server], contextlib.AbstractAsyncContextManager[Talk]]


def place(caller: Caller, request: pb.ExecuteRequest) -> pb.ExecuteRequest:
    return caller.place(request, offset=SLOT_BYTES * request.request_id)


@pytest_asyncio.fixture
async def server(small_model: Path) -> AsyncIterator[Server]:
    async with running_server(small_model, range(16), shared_memory_bytes=1 << 20) as server:
        yield server


both = pytest.mark.parametrize("opened", [streaming, sharing], ids=["stream", "shared-memory"])


@both
async def test_a_request_cancelled_in_the_queue_is_answered_at_once_and_never_computed(
    server: Server, opened: Opened
) -> None:
    gate = Gate(server)
    async with opened(server) as conversation:
        await conversation.request(1)
        await until(lambda: gate.reached == [1])
        for number in (2, 3, 4):
            await conversation.request(number, layer=2)
        await until(lambda: server.engine.queued_tokens == 3 * BATCH.num_tokens)
        await conversation.cancel(3)
        assert await conversation.refusal() == (3, CANCELLED, "request 3 was cancelled by its caller")
        assert server.engine.queued_tokens == 2 * BATCH.num_tokens
        gate.open()
        answers = [await conversation.answer() for _ in range(3)]
        assert {(answer.request_id, answer.error.code) for answer in answers} == {(1, 0), (2, 0), (4, 0)}
    assert gate.reached == [1, 2, 2]
    assert (count_of(server, "cancelled"), count_of(server, "ok")) == (1, 3)


@both
async def test_a_request_cancelled_under_way_is_answered_when_the_device_is_done_with_it(
    server: Server, opened: Opened
) -> None:
    gate = Gate(server)
    async with opened(server) as conversation:
        await conversation.request(1)
        await until(lambda: gate.reached == [1])
        for _ in range(3):
            await conversation.cancel(1)
        answer = asyncio.ensure_future(conversation.refusal())
        await asyncio.sleep(0.2)
        assert not answer.done()
        gate.open()
        assert (await answer)[:2] == (1, CANCELLED)
    assert (count_of(server, "cancelled"), count_of(server, "ok")) == (1, 0)


async def test_when_a_slot_is_answered_for_the_device_has_written_to_it_for_the_last_time(server: Server) -> None:
    expected = (await over_grpc(server)).partials
    gate = Gate(server)
    async with accepted(server) as caller:
        caller.send(place(caller, request_for(server, BATCH, request_id=1)))
        await until(lambda: gate.reached == [1])
        caller.cancel(1)
        await asyncio.sleep(0.1)
        gate.open()
        assert (await caller.answer()).error.code == CANCELLED
        assert caller.partials(SLOT_BYTES) == expected


@both
async def test_what_is_not_in_flight_can_be_cancelled_as_often_as_one_likes(server: Server, opened: Opened) -> None:
    async with opened(server) as conversation:
        for number in (1, 2):
            await conversation.cancel(number)
            await conversation.request(number)
            assert (await conversation.answer()).error.code == 0
            for unknown in (number, number, 0, 2**64 - 1):
                await conversation.cancel(unknown)
    assert (count_of(server, "cancelled"), count_of(server, "ok")) == (0, 2)


@both
async def test_requests_of_other_callers_are_out_of_reach(server: Server, opened: Opened) -> None:
    gate = Gate(server)
    async with opened(server) as mine, opened(server) as theirs:
        await mine.request(1)
        await until(lambda: gate.reached == [1])
        await mine.request(2)
        await theirs.request(2)
        await until(lambda: server.engine.queued_tokens == 2 * BATCH.num_tokens)
        await theirs.cancel(2)
        assert (await theirs.refusal())[:2] == (2, CANCELLED)
        gate.open()
        assert {(await mine.answer()).request_id for _ in range(2)} == {1, 2}


@both
async def test_a_caller_that_leaves_after_it_cancelled_is_forgotten_when_the_device_is_done(
    server: Server, opened: Opened
) -> None:
    gate = Gate(server)
    with contextlib.suppress(asyncio.CancelledError):
        async with opened(server) as conversation:
            await conversation.request(1)
            await until(lambda: gate.reached == [1])
            await conversation.cancel(1)
            await asyncio.sleep(0.1)
            raise asyncio.CancelledError
    gate.open()
    await until(lambda: server.journal.in_flight == 0)
    assert count_of(server, "cancelled") == 1


async def test_a_call_of_its_own_that_ends_leaves_the_queue_at_once(server: Server) -> None:
    gate = Gate(server)
    async with open_channel(server) as channel:
        execute = execute_method(channel)
        running = asyncio.ensure_future(execute(request_for(server, BATCH)))
        await until(lambda: gate.reached == [1])
        unwanted = execute(request_for(server, BATCH, layer=2))
        await until(lambda: server.engine.queued_tokens == BATCH.num_tokens)
        unwanted.cancel()
        await until(lambda: server.engine.queued_tokens == 0)
        gate.open()
        assert (await running).partials
    assert gate.reached == [1]
    assert (count_of(server, "cancelled"), count_of(server, "ok")) == (1, 1)


async def test_a_call_of_its_own_is_ended_not_cancelled_by_a_message(server: Server) -> None:
    async with open_channel(server) as channel:
        request = request_for(server, random_batch(1, 256, 16, 4))
        request.cancels = 3
        with pytest.raises(grpc.aio.AioRpcError, match="cancels is 3; it is for requests of a stream") as refused:
            await execute_method(channel)(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("over_stream", [True, False], ids=["stream", "shared-memory"])
async def test_the_drain_ends_in_time_even_if_the_device_never_answers(small_model: Path, over_stream: bool) -> None:
    async with contextlib.AsyncExitStack() as callers:
        options = {"drain_seconds": 0.5, "device_timeout": 600.0}
        async with asyncio.timeout(20), running_server(small_model, range(16), **options) as server:
            gate = Gate(server)
            callers.callback(gate.open)
            channel = await callers.enter_async_context(open_channel(server))
            caller = await callers.enter_async_context(accepted(server))
            if over_stream:
                await stream_method(channel)().write(request_for(server, BATCH))
            else:
                caller.send(place(caller, request_for(server, BATCH)))
            await until(lambda: bool(gate.reached))
        assert caller.ended(), "its slot may still be written to"
        gate.open()
        # Results must not come after the end of the event loop.
        await until(lambda: not any(thread.is_alive() for thread in server.device._threads))
