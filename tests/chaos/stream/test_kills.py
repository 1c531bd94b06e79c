"""Servers that end while a stream waits for them: it is released within a second, without a wrong sum."""

from pathlib import Path

from tests.chaos.scale import FULL, scaled
from tests.chaos.stream.kills import strike

BLOWS = scaled(200, 4)
MOST_SECONDS = 1.0 if FULL else 3.0
"""The short version runs on machines that do other things, too."""


async def test_every_wait_is_released_and_no_wrong_sum_is_used(small_model: Path, tmp_path: Path) -> None:
    report = await strike(small_model, tmp_path, BLOWS, "cpu")
    print(f"\n{BLOWS} blows: {report}")
    assert report.wrong == []
    assert report.right > 10 * BLOWS
    assert report.longest <= MOST_SECONDS
