"""Shape classes and the sizes that follow from them."""

import pytest

from expertd.kernels.cutile.base.shape import SHAPE_CLASSES, TILE_COUNT_STEP, max_row_tiles, shape_class
from expertd.kernels.cutile.fast.tiles import DEFAULTS, candidates, default_config


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (2, 8), (8, 8), (9, 64), (16384, 16384), (99999, 16384)])
def test_shape_class(tokens: int, expected: int) -> None:
    assert shape_class(tokens) == expected


def test_every_class_has_a_default_that_the_tuner_tries_first() -> None:
    assert set(DEFAULTS) == set(SHAPE_CLASSES)
    for arch in ("sm_90", "sm_120"):
        for tokens in SHAPE_CLASSES:
            configs = candidates(arch, tokens)
            assert configs[0] == default_config(arch, tokens)
            assert len(set(configs)) == len(configs)


def test_batch_invariant_configurations_have_no_tiles_of_few_rows() -> None:
    assert not any(default_config("sm_90", tokens, batch_invariant=True).few_rows for tokens in SHAPE_CLASSES)


@pytest.mark.parametrize("tokens", [1, 3, 64, 1000])
@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("tile_rows", [8, 64, 128])
def test_row_tiles_suffice_for_the_worst_spread(tokens: int, slots: int, tile_rows: int) -> None:
    experts = 32
    pairs = tokens * slots
    # Worst are one pair too many for a tile on every expert.
    spread = [0] * experts
    for index in range(experts):
        spread[index] = 1 if pairs > index else 0
    left = pairs - sum(spread)
    spread[0] += left - left % tile_rows
    needed = sum(-(-count // tile_rows) for count in spread)
    most = max_row_tiles(tokens, slots, experts, tile_rows)
    assert needed <= most
    assert most % TILE_COUNT_STEP == 0
