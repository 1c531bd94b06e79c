"""What torch would give back."""

from typing import Any

import pytest

from expertd.kernels.memory.segments import reusable

EMPTY: dict[str, Any] = {"device": 1, "total_size": 100, "active_size": 0, "segment_pool_id": (0, 0)}


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, 100),
        ({"device": 0}, 0),
        ({"active_size": 1}, 0),
        ({"segment_pool_id": (0, 1)}, 0),
        ({"segment_pool_id": (1, 0)}, 0),
    ],
)
def test_what_holds_nothing_and_is_no_graphs_is_reusable(change: dict[str, Any], size: int) -> None:
    assert reusable([EMPTY | change], 1) == size
    assert reusable([EMPTY, EMPTY | change], 1) == 100 + size
