"""Scores in kernels, where FP32 is short of digits."""

import numpy as np

from expertd.kernels.cutile.routing.scores import SCORINGS, softplus
from expertd.kernels.model.families import FAMILIES
from tests.support.kernels.tiles import called


def test_every_familys_score_has_its_constant() -> None:
    assert {family.scoring_func for family in FAMILIES.values()} == SCORINGS.keys()


def test_softplus_is_exact_to_the_last_digits_wherever_it_is() -> None:
    x = np.linspace(-80, 80, 100_001, dtype=np.float32)
    exact = np.logaddexp(0.0, x.astype(np.float64))
    assert np.abs(called(softplus, x) / exact - 1).max() < 5e-7
