"""The checker finds what is not allowed, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.composed.history import (
    FEWEST_SETTLED,
    HUNG,
    LONGEST_CALL,
    LONGEST_SETTLING,
    MOST_REPEATS,
    RECOVERY,
    RIGHT,
    WRONG,
    CallRecord,
    FaultRecord,
    History,
)

PLACES = ("low-0", "low-1", "high-0", "high-1", "next-0", "next-1")
CALL = CallRecord("default", 1, 8, began=2.0, ended=2.1, outcome=RIGHT)
REFUSED = replace(CALL, outcome="Unavailable", detail="nobody is there")
MENDED, SETTLED = 20.0, 21.0
AFTER = replace(CALL, began=22.0, ended=22.1)
LOSS = FaultRecord("loss", "low", ("low-0", "low-1"), began=1.0, ended=3.0)


def history(*calls: CallRecord, faults: tuple[FaultRecord, ...] = (LOSS,)) -> History:
    """One that is right, but for `calls`."""
    after = [AFTER] * FEWEST_SETTLED
    return History(7, PLACES, [CALL, *calls, *after], list(faults), {"default": 2.0}, MENDED, SETTLED)


def test_right_answers_and_errors_without_an_owner_are_allowed() -> None:
    assert history(REFUSED, replace(REFUSED, began=3.0 + RECOVERY - 0.1, ended=3.0 + RECOVERY)).violations() == []


@pytest.mark.parametrize(
    "faults", [(), (replace(LOSS, places=("low-0", "high-1")),), (replace(LOSS, places=PLACES[4:]),)]
)
def test_no_error_is_allowed_while_every_expert_has_a_sound_owner(faults: tuple[FaultRecord, ...]) -> None:
    (violation,) = history(REFUSED, faults=faults).violations()
    assert "every expert had a sound owner: Unavailable: nobody is there" in violation


def test_an_error_is_explained_by_faults_of_that_time_and_generation_alone() -> None:
    assert history(replace(REFUSED, began=0.1, ended=0.5)).violations()
    assert history(replace(REFUSED, began=3.1 + RECOVERY, ended=3.2 + RECOVERY)).violations()
    assert history(replace(REFUSED, coordinator="next")).violations()
    endless = replace(LOSS, ended=None)
    assert history(replace(REFUSED, began=18.0, ended=18.1), faults=(endless,)).violations() == []


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (replace(CALL, outcome=WRONG, detail="relative error 0.2"), "wrong: relative error 0.2"),
        (replace(CALL, outcome=HUNG, ended=2.0), "hung"),
        (replace(CALL, outcome="InvalidBatch"), "InvalidBatch"),
        (replace(CALL, outcome="KeyError"), "KeyError"),
        (replace(CALL, ended=CALL.began + LONGEST_CALL + 1), f"it took {LONGEST_CALL + 1:.1f} s"),
        (replace(REFUSED, ended=CALL.began + LONGEST_CALL + 1), "it took"),
        (replace(CALL, repeats=MOST_REPEATS + 1), f"{MOST_REPEATS + 1} repeats"),
        (replace(AFTER, outcome="Overloaded"), "after everything was mended: Overloaded"),
    ],
)
def test_what_a_call_may_not_do(call: CallRecord, why: str) -> None:
    violations = history(call).violations()
    assert violations
    assert all(why in violation for violation in violations) or call.began > SETTLED


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda story: story.repeats.update(default=500.0), "500 repeats in 6 calls"),
        (lambda story: setattr(story, "settled", None), "not all servers are used"),
        (lambda story: setattr(story, "settled", MENDED + LONGEST_SETTLING + 1), "not all servers are used"),
        (lambda story: story.calls.pop(), "4 right answers after everything was mended"),
    ],
)
def test_what_a_whole_run_may_not_do(harm: Callable[[History], object], why: str) -> None:
    story = history()
    harm(story)
    (violation,) = story.violations()
    assert why in violation


def test_a_history_is_written_in_the_order_of_its_times(tmp_path: Path) -> None:
    history(REFUSED).write(tmp_path / "7.jsonl")
    *entries, rest = map(json.loads, (tmp_path / "7.jsonl").read_text().splitlines())
    assert rest == {"seed": 7, "repeats": {"default": 2.0}, "mended": MENDED, "settled": SETTLED}
    assert [entry["began"] for entry in entries] == sorted(entry["began"] for entry in entries)
    assert sum(entry.get("kind") == "loss" for entry in entries) == 1
