"""The native core by itself: NumPy's memory, no torch, so that sanitizers can watch (see test_build.py)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd import _native
from tests.support.instructions import AVAILABLE, BEST

Array = npt.NDArray[np.generic]
NO_SCALES = (0, 0)


@pytest.fixture(autouse=True)
def best_again() -> Iterator[None]:
    yield
    assert _native.use_instruction_set(BEST)


def address(values: Array) -> int:
    return int(values.__array_interface__["data"][0])


def place(values: Array) -> tuple[int, int]:
    return address(values), values.strides[0]


def by_bits(data: bytes, crc: int = 0) -> int:
    crc = ~crc & 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return ~crc & 0xFFFFFFFF


def test_the_best_instruction_set_is_used_and_others_are_refused() -> None:
    assert AVAILABLE[-1] == BEST
    assert not _native.use_instruction_set("sparc")
    assert _native.instruction_set() == BEST


@pytest.mark.parametrize("instructions", AVAILABLE)
def test_the_checksum_is_crc_32c(instructions: str) -> None:
    assert _native.use_instruction_set(instructions)
    assert _native.crc32c(b"123456789") == 0xE3069283
    assert _native.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    raw = np.random.default_rng(0).bytes(40_000)
    for size in (0, 1, 7, 8, 9, 767, 768, 769, 12_287, 12_288, 12_289, 13_061, 39_999):
        for offset in (0, 1):
            piece = raw[offset : offset + size]
            assert _native.crc32c(memoryview(raw)[offset : offset + size], 99) == by_bits(piece, 99), size


@given(data=st.binary(max_size=3000), cut=st.integers(0, 3000), instructions=st.sampled_from(AVAILABLE))
@settings(deadline=None)
def test_the_checksum_goes_on_where_it_stopped(data: bytes, cut: int, instructions: str) -> None:
    assert _native.use_instruction_set(instructions)
    assert _native.crc32c(data[cut:], _native.crc32c(data[:cut])) == _native.crc32c(data) == by_bits(data)


@pytest.mark.parametrize("data", [3, "text", memoryview(bytes(8))[::2]])
def test_what_is_no_row_of_bytes_has_no_checksum(data: object) -> None:
    with pytest.raises((TypeError, BufferError)):
        _native.crc32c(data)  # type: ignore[arg-type]


def quantized(hidden: Array, code: int) -> tuple[Array, Array]:
    """Into rows further apart than they are wide, between guards."""
    tokens, width = hidden.shape
    out, scales = np.full((tokens, width + 3), 0xAA, np.uint8), np.full((tokens, width // 128 + 1), -1, np.float32)
    finite = _native.quantize(place(hidden), code, tokens, width, place(out), place(scales))
    assert finite == bool(np.isfinite(scales).all())
    assert (out[:, width:] == 0xAA).all()
    assert (scales[:, -1] == -1).all()
    return out[:, :width].copy(), scales[:, :-1].copy()


@pytest.mark.parametrize("code", [_native.BFLOAT16, _native.FLOAT16, _native.FLOAT32])
@pytest.mark.parametrize("tokens", [0, 1, 3, 700])
def test_quantising_does_not_depend_on_the_instruction_set(tokens: int, code: int) -> None:
    generator = np.random.default_rng(tokens)
    bits = generator.integers(0, 1 << 32, (tokens, 384 + 1), np.uint32)
    stored = np.ascontiguousarray(bits if code == _native.FLOAT32 else bits.astype(np.uint16))[:, 1:]
    results = []
    for instructions in AVAILABLE:
        assert _native.use_instruction_set(instructions)
        results.append(quantized(stored, code))
    for values, scales in results:
        assert (values == results[0][0]).all()
        assert (scales.view(np.uint32) == results[0][1].view(np.uint32)).all()


def test_a_width_of_no_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        _native.quantize((0, 0), _native.FLOAT32, 1, 130, (0, 0), (0, 0))


@given(
    rows=st.integers(1, 40),
    width=st.sampled_from([1, 5, 64, 1023, 1025]),
    sizes=st.lists(st.integers(0, 40), max_size=5),
    weighted=st.booleans(),
    instructions=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
def test_parts_are_added_in_their_order(
    rows: int, width: int, sizes: list[int], weighted: bool, instructions: str, seed: int
) -> None:
    assert _native.use_instruction_set(instructions)
    generator = np.random.default_rng(seed)
    expected = np.zeros((rows, width), np.float32)
    parts, kept = [], []
    for size in sizes:
        chosen = np.sort(generator.permutation(rows)[:size]).astype(np.int64)
        sums = generator.standard_normal((len(chosen), width + 2), np.float32)
        weights = generator.standard_normal(len(chosen), np.float32)
        own = sums[:, 1:-1]
        expected[chosen] += own * weights[:, None] if weighted else own
        kept += [chosen, sums, weights]
        parts.append(
            (place(own), _native.FLOAT32, len(chosen), address(chosen), address(weights) if weighted else 0, NO_SCALES)
        )
    out = np.full((rows, width + 1), 7, np.float32)
    _native.sum_parts(parts, rows, width, _native.FLOAT32, place(out))
    assert (out[:, :width].view(np.uint32) == expected.view(np.uint32)).all()
    assert (out[:, width] == 7).all()


@pytest.mark.parametrize("indices", [[0, 5], [-1, 0], [1, 1], [2, 1]])
def test_rows_that_do_not_ascend_within_the_sum_are_refused(indices: list[int]) -> None:
    chosen, sums, out = np.array(indices), np.ones((2, 8), np.float32), np.zeros((5, 8), np.float32)
    with pytest.raises(IndexError, match="rows must ascend, each below 5"):
        _native.sum_parts(
            [(place(sums), _native.FLOAT32, 2, address(chosen), 0, NO_SCALES)], 5, 8, _native.FLOAT32, place(out)
        )
    assert not out.any()


@pytest.mark.parametrize("count", [0, 1, 500])
@pytest.mark.parametrize("row_bytes", [1, 33, 14_336])
def test_gathered_rows_are_those_asked_for(count: int, row_bytes: int) -> None:
    generator = np.random.default_rng(count)
    source = generator.integers(0, 256, (600, row_bytes + 5), np.uint8)
    indices = generator.integers(0, 600, count)
    out = np.full((count, row_bytes + 1), 9, np.uint8)
    _native.gather(place(source), 600, row_bytes, address(indices), count, place(out))
    assert (out[:, :row_bytes] == source[indices, :row_bytes]).all()
    assert (out[:, row_bytes] == 9).all()


@pytest.mark.parametrize("index", [-1, 4])
def test_a_row_beyond_the_source_is_refused(index: int) -> None:
    source, out, indices = np.ones((4, 8), np.uint8), np.zeros((2, 8), np.uint8), np.array([0, index])
    with pytest.raises(IndexError, match=f"row {index} of 4"):
        _native.gather(place(source), 4, 8, address(indices), 2, place(out))
    assert not out.any()


def test_an_expert_beyond_the_owners_is_refused() -> None:
    ids, weights, owner = np.array([[0, 9]], np.int32), np.ones((1, 2), np.float32), np.zeros(4, np.int64)
    with pytest.raises(IndexError, match="expert 9"):
        _native.split(address(ids), address(weights), 1, 2, address(owner), 4, 1, (0, 0, 0))


def large_sum(seed: int) -> tuple[Array, Array]:
    """A sum that the pool shares, and what it must be."""
    generator = np.random.default_rng(seed)
    sums = generator.standard_normal((2, 300, 2048), np.float32)
    rows = np.arange(300)
    out = np.empty((300, 2048), np.float32)
    parts = [(place(each), _native.FLOAT32, 300, address(rows), 0, NO_SCALES) for each in sums]
    _native.sum_parts(parts, 300, 2048, _native.FLOAT32, place(out))
    return out, sums[0] + sums[1]


def test_many_threads_share_the_pool() -> None:
    wrong = []

    def work(seed: int) -> None:
        for turn in range(20):
            out, expected = large_sum(100 * seed + turn)
            if not (out == expected).all():
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= _native.pool_size() <= min(16, len(os.sched_getaffinity(0)))


@pytest.mark.skipif(
    "tsan" in os.environ.get("LD_PRELOAD", ""), reason="TSan's runtime does not survive fork with threads"
)
def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    large_sum(1)
    child = os.fork()
    if child == 0:
        out, expected = large_sum(2)
        os._exit(0 if (out == expected).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    out, expected = large_sum(3)
    assert (out == expected).all()
