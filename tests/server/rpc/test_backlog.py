"""How streams share what may be unanswered."""

import asyncio

import pytest

from expertd.server.rpc.backlog import Backlog


async def waits(waiting: asyncio.Task[None]) -> bool:
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return not waiting.done()


async def test_one_stream_gets_half_two_get_a_third_each() -> None:
    backlog = Backlog(120)
    first, second = backlog.open(), backlog.open()
    first.took(59)
    await first.room()
    first.took(1)
    full = asyncio.create_task(first.room())
    assert await waits(full)
    second.took(29)
    await second.room()
    second.took(1)
    also_full = asyncio.create_task(second.room())
    assert await waits(also_full)
    first.gave(10)
    assert not await waits(also_full)
    assert await waits(full)
    first.gave(10)
    assert not await waits(full)


async def test_whoever_holds_nothing_need_not_wait_however_much_others_hold() -> None:
    backlog = Backlog(100)
    greedy, modest = backlog.open(), backlog.open()
    greedy.took(250)
    assert backlog.left == -150
    async with asyncio.timeout(1.0):
        await modest.room()
    modest.took(1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await modest.room()


async def test_an_answer_that_is_taken_makes_room_for_its_own_stream() -> None:
    backlog = Backlog(100)
    share = backlog.open()
    for _ in range(3):
        share.took(50)
        waiting = asyncio.create_task(share.room())
        assert await waits(waiting)
        share.gave(50)
        assert not await waits(waiting)
    assert backlog.left == 100
