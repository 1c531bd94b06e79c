"""A coroutine that is begun at once: what it does then, and how it ends for whoever awaits it."""

import asyncio

import pytest

from expertd.client.base.begun import Begun


async def test_the_first_step_is_done_before_anybody_awaits_it() -> None:
    steps: list[str] = []
    gates = [asyncio.Event(), asyncio.Event()]

    async def work() -> None:
        for number, gate in enumerate(gates):
            steps.append(f"waits for {number}")
            await gate.wait()
        steps.append("over")

    begun = Begun(work())
    assert steps == ["waits for 0"]
    awaiting = asyncio.ensure_future(_wait_for(begun))
    for gate in gates:
        await asyncio.sleep(0.01)
        assert not awaiting.done()
        gate.set()
    await awaiting
    assert steps == ["waits for 0", "waits for 1", "over"]


async def test_what_needs_no_wait_is_over_at_once() -> None:
    done: list[int] = []

    async def work() -> None:
        done.append(1)

    begun = Begun(work())
    assert done == [1]
    await begun


@pytest.mark.parametrize("late", [False, True])
async def test_whoever_awaits_it_gets_its_error(late: bool) -> None:
    async def work() -> None:
        await asyncio.sleep(0.01 if late else 0)
        raise LookupError("a bug")

    async def work_at_once() -> None:
        raise LookupError("a bug")

    begun = Begun(work() if late else work_at_once())
    with pytest.raises(LookupError, match="a bug"):
        await begun


async def test_it_is_cancelled_with_the_task_that_awaits_it() -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    awaiting = asyncio.ensure_future(_wait_for(Begun(work())))
    await asyncio.sleep(0.01)
    awaiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await awaiting
    assert seen == ["cancelled"]


async def _wait_for(begun: Begun) -> None:
    await begun
