"""MXFP4 to FP8 blocks: the native core against torch, and both against weights that are decoded by hand in FP64."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertd.kernels.numerics.mxfp4 import EXPONENTS, convert_into, decode, round_to_blocks
from expertd.kernels.numerics.quantize import FP8

ROWS, COLUMNS = 256, 384
Doubles = npt.NDArray[np.float64]


def stored(low: int, high: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random codes, with random exponents from `low` to `high`."""
    chance = torch.Generator().manual_seed(seed)
    packed = torch.randint(-128, 128, (ROWS, COLUMNS // 2), dtype=torch.int8, generator=chance)
    exponents = torch.randint(low, high + 1, (ROWS, COLUMNS // 32), dtype=torch.uint8, generator=chance)
    return packed, exponents.view(EXPONENTS)


def by_hand(packed: Tensor, exponents: Tensor) -> Doubles:
    """Sign, two bits of exponent and one of mantissa of each half of a byte, the lower half first."""
    codes = packed.view(torch.uint8).numpy().astype(np.int64)
    values: Doubles = np.empty((ROWS, COLUMNS))
    for half in (0, 1):
        code = codes >> 4 * half & 15
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = np.where(exponent > 0, 2.0 ** (exponent - 1) * (1 + mantissa / 2), mantissa / 2)
        values[:, half::2] = np.where(code & 8, -magnitude, magnitude)
    powers = 2.0 ** (exponents.view(torch.uint8).numpy().astype(np.float64) - 127)
    return values * powers.repeat(32, axis=1)


def converted(packed: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor, int, bool]:
    out, scales = torch.empty(ROWS, COLUMNS, dtype=FP8), torch.full((ROWS // 128, COLUMNS // 128), torch.nan)
    return out, scales, *convert_into(packed, exponents, out, scales)


def served(weight: Tensor, scales: Tensor) -> Doubles:
    values: Doubles = weight.double().numpy() * blocks_of(scales.double().numpy())
    return values


def blocks_of(scales: Doubles) -> Doubles:
    return scales.repeat(128, axis=0).repeat(128, axis=1)


def largest(values: Doubles) -> Doubles:
    amax: Doubles = np.abs(values).reshape(ROWS // 128, 128, COLUMNS // 128, 128).max(axis=(1, 3))
    return amax


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 14), (100, 100), (110, 122), (120, 133), (241, 252)])
def test_every_weight_is_exact_where_exponents_of_a_block_allow(low: int, high: int) -> None:
    packed, exponents = stored(low, high)
    weight, scales, inexact, _ = converted(packed, exponents)
    assert inexact == 0
    assert np.array_equal(served(weight, scales), by_hand(packed, exponents))
    assert (scales.frexp().mantissa == 0.5).all()


@pytest.mark.parametrize(("low", "high"), [(100, 117), (90, 140), (0, 252)])
def test_what_is_not_exact_is_counted_and_within_its_bound(low: int, high: int) -> None:
    packed, exponents = stored(low, high)
    weight, scales, inexact, _ = converted(packed, exponents)
    wanted = by_hand(packed, exponents)
    error = np.abs(served(weight, scales) - wanted)
    assert 0 < inexact == np.count_nonzero(error)
    assert (error <= blocks_of(largest(wanted)) * 2.0**-18).all()
    # Of 128x128 such errors beside one such weight.
    assert np.linalg.norm(error) / np.linalg.norm(wanted) < 2.0**-11


def test_the_largest_of_a_block_becomes_256_or_384() -> None:
    packed, exponents = stored(90, 140)
    weight, _, _, _ = converted(packed, exponents)
    assert set(largest(weight.double().numpy()).flat) <= {256.0, 384.0}


@settings(max_examples=40, deadline=None)
@given(low=st.integers(0, 252), width=st.integers(0, 60), seed=st.integers(0, 2**32), zeros=st.integers(0, 3))
def test_the_native_core_has_torchs_bits(low: int, width: int, seed: int, zeros: int) -> None:
    packed, exponents = stored(low, min(low + width, 252), seed)
    packed[: 128 * min(zeros, 2), : 64 * zeros] &= -0x78  # signs alone
    weight, scales, inexact, some = converted(packed, exponents)
    expected, expected_scales = round_to_blocks(decode(packed, exponents))
    assert torch.equal(weight.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)
    assert inexact == np.count_nonzero(served(weight, scales) != by_hand(packed, exponents))
    assert some == (zeros < 3)


def test_torch_decodes_what_is_stored() -> None:
    packed, exponents = stored(0, 252)
    assert np.array_equal(decode(packed, exponents).double().numpy(), by_hand(packed, exponents))


def test_zeros_have_a_scale_of_one() -> None:
    weight, scales = round_to_blocks(torch.zeros(128, 256))
    assert not weight.float().any()
    assert (scales == 1).all()


def test_rows_may_lie_apart_and_others_stay_as_they_are() -> None:
    packed, exponents = stored(110, 122)
    wide, wide_scales = torch.full((ROWS, COLUMNS + 7), 1.0).to(FP8), torch.full((2, 5), 7.0)
    apart = torch.cat([packed, packed], dim=1)[:, : COLUMNS // 2]
    convert_into(apart, exponents, wide[:, :COLUMNS], wide_scales[:, :3])
    expected, scales = round_to_blocks(decode(packed, exponents))
    assert torch.equal(wide[:, :COLUMNS].float(), expected.float())
    assert torch.equal(wide_scales[:, :3], scales)
    assert (wide[:, COLUMNS:].float() == 1).all()
    assert (wide_scales[:, 3:] == 7).all()


def test_what_does_not_fit_is_refused() -> None:
    packed, exponents = stored(110, 122)
    out, scales = torch.empty(ROWS, COLUMNS, dtype=FP8), torch.empty(2, 3)
    with pytest.raises(ValueError, match=r"it must be torch\.float8_e8m0fnu"):
        convert_into(packed, exponents[:, :-1], out, scales)
    with pytest.raises(ValueError, match=r"it must be torch\.int8"):
        convert_into(packed.view(torch.uint8), exponents, out, scales)
    with pytest.raises(ValueError, match="multiples of 128"):
        convert_into(packed[:64], exponents[:64], out[:64], scales[:0])
