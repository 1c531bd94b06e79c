"""The native token functions against torch, bit by bit, with every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd import _native
from expertd.kernels.numerics import tokens
from expertd.kernels.numerics.quantize import FP8, dequantize_activations, quantize_activations
from expertd.kernels.numerics.tokens import Addend
from tests.support.instructions import AVAILABLE, BEST

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def best_again() -> Iterator[None]:
    yield
    assert _native.use_instruction_set(BEST)


def check_quantized(hidden: torch.Tensor) -> None:
    count, width = hidden.shape
    out, scales = torch.empty(hidden.shape, dtype=FP8), torch.empty(count, width // 128)
    expected, expected_scales = quantize_activations(hidden)
    for instructions in AVAILABLE:
        assert _native.use_instruction_set(instructions)
        tokens.quantize_into(hidden, out, scales)
        assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8)), instructions
        # A NaN's other bits depend on the order in which torch looks for the largest value.
        nan = expected_scales.isnan()
        assert torch.equal(scales.isnan(), nan)
        assert torch.equal(scales[~nan].view(torch.int32), expected_scales[~nan].view(torch.int32)), instructions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_quantised_as_torch_does(dtype: torch.dtype) -> None:
    values = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    check_quantized(values.reshape(-1, 128))
    check_quantized(values.reshape(128, -1).T.contiguous())
    # Each beside values of its own size, so that none is zero for a large one's sake.
    check_quantized(values[values.isfinite()].abs().sort().values.reshape(-1, 128))
    check_quantized(torch.where(values.isfinite(), values, 1).reshape(-1, 128))
    # Each alone in a block, among ones.
    alone = torch.ones(65536, 128, dtype=dtype)
    alone[:, 77] = values
    check_quantized(alone)


@given(
    count=st.integers(0, 20),
    blocks=st.integers(1, 5),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    exponent=st.integers(-140, 120),
    extra=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_hidden_states_are_quantised_as_torch_does(
    count: int, blocks: int, dtype: torch.dtype, exponent: int, extra: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(count, blocks * 128 + extra, generator=generator) * 2.0**exponent
    check_quantized(wide.to(dtype)[:, : blocks * 128])


def test_fp32_bits_of_every_kind_are_quantised_as_torch_does() -> None:
    bits = torch.randint(-(2**31), 2**31, (4096, 256), generator=torch.Generator().manual_seed(0)).int()
    check_quantized(bits.view(torch.float32))
    # Halfway between two FP8 values, and a bit above and below.
    ties = torch.arange(1, 2**15).float().reciprocal().repeat_interleave(4)[: 32768 - 128].reshape(-1, 128)
    ties[:, 0] = 448
    ties[:, 1:] = (ties[:, 1:] * 448).view(torch.int32).add(0x8000).bitwise_and(-0x80000).view(torch.float32)
    check_quantized(ties)
    check_quantized((ties.view(torch.int32) + 1).view(torch.float32))


@given(
    count=st.integers(1, 40),
    width=st.sampled_from([1, 7, 128, 1030]),
    sizes=st.lists(st.integers(0, 40), max_size=4),
    stored=st.sampled_from(FLOATS),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    any_bits=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_sums_are_those_of_torch(
    count: int, width: int, sizes: list[int], stored: torch.dtype, dtype: torch.dtype, any_bits: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts, total = [], torch.zeros(count, width)
    for size in sizes:
        rows = torch.randperm(count, generator=generator)[:size].sort().values
        if any_bits:
            bits = torch.randint(-(2**15), 2**15, (len(rows), width * stored.itemsize // 2), generator=generator)
            sums = bits.short().view(stored)
        else:
            sums = torch.randn(len(rows), width, generator=generator).to(stored)
        weights = torch.randn(len(rows), generator=generator) if seed % 2 else None
        added = sums.float() if weights is None else sums.float() * weights[:, None]
        with np.errstate(all="ignore"):
            total.numpy()[rows.numpy()] += added.numpy()
        parts.append(Addend(sums, rows, weights))
    expected = torch.empty(count, width, dtype=dtype).copy_(total)
    nan = expected.isnan()
    for instructions in AVAILABLE:
        assert _native.use_instruction_set(instructions)
        out = torch.empty(count, width, dtype=dtype)
        tokens.sum_into(out, parts)
        assert torch.equal(out.isnan(), nan)
        raw, wanted = (each.masked_fill(nan, 1).view(torch.uint8) for each in (out, expected))
        assert torch.equal(raw, wanted), instructions
        if dtype == torch.bfloat16:
            assert torch.equal(out.view(torch.int16), expected.view(torch.int16)), "NaN as torch writes it on x86"


@given(
    count=st.integers(1, 20),
    width=st.sampled_from([128, 256, 1152]),
    sizes=st.lists(st.integers(0, 20), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_sums_of_fp8_are_those_of_torch(
    count: int, width: int, sizes: list[int], dtype: torch.dtype, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts, total = [], torch.zeros(count, width)
    for size in sizes:
        rows = torch.randperm(count, generator=generator)[:size].sort().values
        # Every code there is, NaN among them.
        sums = torch.randint(256, (len(rows), width), generator=generator, dtype=torch.uint8).view(FP8)
        scales = torch.rand(len(rows), width // 128, generator=generator)
        weights = torch.randn(len(rows), generator=generator) if weighted else None
        added = dequantize_activations(sums, scales)
        total[rows] += added if weights is None else added * weights[:, None]
        parts.append(Addend(sums, rows, weights, scales))
    expected = total.to(dtype)
    for instructions in AVAILABLE:
        assert _native.use_instruction_set(instructions)
        out = torch.empty(count, width, dtype=dtype)
        tokens.sum_into(out, parts)
        nan = expected.isnan()
        assert torch.equal(out.isnan(), nan)
        raw, wanted = (each.masked_fill(nan, 1).view(torch.uint8) for each in (out, expected))
        assert torch.equal(raw, wanted), instructions


@given(count=st.integers(1, 30), dtype=st.sampled_from([*FLOATS, FP8]), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_gathered_rows_are_those_of_torch(count: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(25, 130, generator=generator).to(dtype)
    rows = torch.randint(25, (count,), generator=generator)
    found = tokens.gather(values, rows)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), values.view(torch.uint8)[rows])


@given(count=st.integers(0, 40), top_k=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_pairs_are_counted_as_by_numpy(count: int, top_k: int, seed: int) -> None:
    ids = torch.randint(-1, 16, (count, top_k), generator=torch.Generator().manual_seed(seed)).int()
    pairs = np.bincount(ids.numpy().ravel() + 1)
    assert tokens.count_pairs(ids) == {expert: n for expert, n in enumerate(pairs[1:].tolist()) if n}
    assert list(tokens.count_pairs(ids)) == sorted(tokens.count_pairs(ids))


@pytest.mark.parametrize(
    ("hidden", "out", "scales"),
    [
        (torch.ones(2, 256), torch.empty(2, 128, dtype=FP8), torch.empty(2, 2)),
        (torch.ones(2, 256), torch.empty(2, 256, dtype=torch.uint8), torch.empty(2, 2)),
        (torch.ones(2, 256), torch.empty(2, 256, dtype=FP8), torch.empty(2, 1)),
        (torch.ones(2, 256), torch.empty(256, 2, dtype=FP8).T, torch.empty(2, 2)),
        (torch.ones(256, 2).T, torch.empty(2, 256, dtype=FP8), torch.empty(2, 2)),
        (torch.ones(2, 256, device="meta"), torch.empty(2, 256, dtype=FP8), torch.empty(2, 2)),
    ],
    ids=["narrow", "dtype", "few scales", "columns out", "columns in", "no memory"],
)
def test_tensors_that_do_not_fit_are_refused(hidden: torch.Tensor, out: torch.Tensor, scales: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="it must be"):
        tokens.quantize_into(hidden, out, scales)


def test_parts_that_do_not_fit_are_refused() -> None:
    rows = torch.arange(2)
    fp8, scales = torch.ones(2, 256).to(FP8), torch.ones(2, 2)
    for part in (Addend(fp8, rows), Addend(torch.ones(2, 256), rows, scales=scales)):
        with pytest.raises(ValueError, match=r"scales belong to torch\.float8_e4m3fn, and to nothing else"):
            tokens.sum_into(torch.zeros(5, 256), [part])
    for part in (Addend(fp8, rows, scales=scales[:, :1]), Addend(fp8[:, :200], rows, scales=scales[:, :1])):
        with pytest.raises(ValueError, match="must be"):
            tokens.sum_into(torch.zeros(5, part.sums.shape[1]), [part])
    for part in (Addend(torch.ones(3, 4), rows), Addend(torch.ones(2, 5), rows), Addend(torch.ones(2, 4), rows.int())):
        with pytest.raises(ValueError, match="it must be"):
            tokens.sum_into(torch.zeros(5, 4), [part])
