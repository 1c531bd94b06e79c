"""Background tasks that fail, go on, are waited for and are ended."""

import asyncio
import logging

import pytest

from expertd.proto.base.tasks import Tasks

PAUSES = 0.001, 0.004


async def fail(message: str = "a bug") -> None:
    raise LookupError(message)


async def wait_for_ever() -> None:
    await asyncio.Event().wait()


async def test_a_failure_is_logged_with_its_traceback_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    failures: list[None] = []
    tasks = Tasks(lambda: failures.append(None))
    tasks.start(fail(), "counting sheep")
    tasks.start(asyncio.sleep(0), "sleeping")
    await tasks.settle()
    (record,) = caplog.records
    assert (record.levelno, record.message, len(failures)) == (logging.ERROR, "counting sheep failed", 1)
    assert "raise LookupError(message)\nLookupError: a bug" in caplog.text


async def test_kept_work_begins_again_after_longer_and_longer_pauses_until_it_returns(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[None] = []
    begun: list[float] = []

    async def work() -> None:
        begun.append(asyncio.get_running_loop().time())
        if len(begun) <= 4:
            await fail()

    monkeypatch.setattr("random.uniform", lambda low, high: (low + high) / 2)
    tasks = Tasks(lambda: failures.append(None), pauses=PAUSES)
    await tasks.keep(work, "watching")
    assert (len(begun), len(failures)) == (5, 4)
    pauses = [f"watching failed and begins again in about {seconds:g} s" for seconds in (0.001, 0.002, 0.004, 0.004)]
    assert [record.message for record in caplog.records] == pauses
    assert caplog.text.count("LookupError: a bug") == 4
    assert begun[4] - begun[0] >= 0.011


async def test_new_beginnings_are_counted_and_failures_of_started_work_are_none() -> None:
    counted: list[str] = []
    lives = iter([fail, fail, lambda: asyncio.sleep(0)])
    tasks = Tasks(lambda: counted.append("error"), lambda: counted.append("restart"), PAUSES)
    await tasks.keep(lambda: next(lives)(), "watching")
    tasks.start(fail(), "counting sheep")
    await tasks.settle()
    assert counted == ["error", "restart", "error", "restart", "error"]


async def test_work_that_went_on_for_long_begins_again_soon(caplog: pytest.LogCaptureFixture) -> None:
    lives = iter([0.0, 0.0, 0.01, None])

    async def work() -> None:
        life = next(lives)
        if life is not None:
            await asyncio.sleep(life)
            await fail()

    await Tasks(pauses=PAUSES).keep(work, "watching")
    assert [record.message.split()[-2] for record in caplog.records] == ["0.001", "0.002", "0.001"]


async def test_work_goes_on_when_what_it_waits_for_is_cancelled_by_others(caplog: pytest.LogCaptureFixture) -> None:
    begun: list[None] = []

    async def work() -> None:
        begun.append(None)
        waited = asyncio.get_running_loop().create_future()
        if len(begun) == 1:
            waited.cancel()
        await waited

    tasks = Tasks(pauses=PAUSES)
    kept = tasks.keep(work, "watching")
    async with asyncio.timeout(5):
        while len(begun) < 2:
            await asyncio.sleep(0)
    assert "watching failed and begins again" in caplog.text
    await tasks.close()
    assert kept.cancelled()


async def test_closing_cancels_all_and_waits_for_what_they_still_do(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    async def tidy(name: str) -> None:
        try:
            await wait_for_ever()
        finally:
            await asyncio.sleep(0.01)
            done.append(name)

    tasks = Tasks(pauses=PAUSES)
    tasks.start(tidy("started"), "working")
    tasks.keep(lambda: tidy("kept"), "working")
    pausing = tasks.keep(fail, "failing")
    await asyncio.sleep(0.001)
    await tasks.close()
    assert sorted(done) == ["kept", "started"]
    assert pausing.cancelled()
    assert all(record.message.startswith("failing failed") for record in caplog.records)
    await tasks.close()


async def test_settling_waits_for_all_or_so_long() -> None:
    tasks = Tasks(pauses=PAUSES)
    await tasks.settle()
    quick = tasks.start(asyncio.sleep(0.01), "sleeping")
    await tasks.settle()
    assert quick.done()
    slow = tasks.start(wait_for_ever(), "waiting")
    await tasks.settle(timeout=0.01)
    assert not slow.done()
    await tasks.close()
    assert slow.cancelled()
