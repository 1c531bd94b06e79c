"""Lists of numbers as text."""

import pytest

from expertd.kernels.model.ranges import format_ranges, parse_ranges


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("5", (5,)), ("0-3", (0, 1, 2, 3)), ("7, 0-2,2", (0, 1, 2, 7)), ("4-4", (4,))],
)
def test_ranges_are_read_as_ascending_distinct_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_ranges(text) == numbers


@pytest.mark.parametrize("numbers", [(0,), (0, 1, 2), (0, 2, 4), (1, 2, 3, 7, 9, 10), tuple(range(256))])
def test_ranges_survive_printing(numbers: tuple[int, ...]) -> None:
    assert parse_ranges(format_ranges(numbers)) == numbers
    assert format_ranges(range(32)) == "0-31"
