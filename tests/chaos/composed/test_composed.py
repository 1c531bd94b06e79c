"""Faults of all kinds at once: every call is right or refused for a reason, and the fleet is whole again afterwards."""

import os
from pathlib import Path

import pytest

from tests.chaos.composed.run import make_models, run_seed
from tests.chaos.composed.stage import Models
from tests.chaos.composed.totals import Totals
from tests.chaos.scale import scaled

FIRST = int(os.environ.get("EXPERTD_CHAOS_SEED", "0"))
SEEDS = range(FIRST, FIRST + scaled(200, 4))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


async def test_any_faults_at_once_are_survived(models: Models, tmp_path: Path) -> None:
    totals = Totals()
    for seed in SEEDS:
        violations = await run_seed(seed, models, tmp_path, totals)
        assert violations == [], f"EXPERTD_CHAOS_SEED={seed} replays it; its history is {tmp_path / f'{seed}.jsonl'}"
    print(f"{totals.line()}\n{totals.kinds()}")
    assert totals.faults.total() > 2 * len(SEEDS)
