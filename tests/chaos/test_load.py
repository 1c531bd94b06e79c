"""What checks results does not take NaN for right."""

import math

import pytest
import torch

from expertd.kernels.oracle.reference import relative_error
from tests.chaos.load import TOLERANCE, is_right


@pytest.mark.parametrize(
    ("error", "right"), [(0.0, True), (TOLERANCE, True), (2 * TOLERANCE, False), (math.inf, False), (math.nan, False)]
)
def test_only_small_errors_are_right(error: float, right: bool) -> None:
    assert is_right(error) == right


def test_a_result_with_nan_is_wrong() -> None:
    right = torch.randn(3, 4)
    assert is_right(relative_error(right.clone(), right))
    assert not is_right(relative_error(right.clone().index_fill_(0, torch.tensor([1]), math.nan), right))
