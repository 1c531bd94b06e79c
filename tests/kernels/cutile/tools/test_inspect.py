from typing import Annotated

import cuda.tile as ct
import pytest
import torch
from cuda.tile.compilation import ArrayConstraint, ConstantConstraint, ScalarConstraint

from expertd.kernels.cutile.base.launch import Gpu, Launch, hinted
from expertd.kernels.cutile.tools.inspect import inspect_kernel, signature

ConstInt = Annotated[int, ct.ConstantAnnotation()]


@ct.kernel  # type: ignore[untyped-decorator]
def scale_kernel(x: ct.Array, y: ct.IndexedWithInt64[ct.Array], factor: float, TILE: ConstInt) -> None:  # noqa: N803
    i = ct.bid(0)
    ct.store(y, (i, 0), ct.load(x, (i, 0), (1, TILE)) * factor)


@ct.kernel  # type: ignore[untyped-decorator]
def summed_tiles_kernel(rows: ct.Array, weights: ct.Array, counts: ct.Array, out: ct.Array, BULK: ConstInt) -> None:  # noqa: N803
    for tile in range(ct.bid(0), ct.sum(ct.load(counts, (0,), (8,))), ct.num_blocks(0)):
        zeros = ct.zeros((64, 8), dtype=ct.float32)
        total = ct.zeros((64, 8), dtype=ct.float32)
        for k in range(14):
            x = ct.load(rows, (k, 0), (128, 8), order=(1, 0), latency=8)
            total += ct.mma(ct.load(weights, (tile, k), (64, 128), latency=8), x, zeros)
        ct.store(out, (0, tile), ct.transpose(total), allow_tma=BULK > 0)


def arguments(rows: int, columns: int) -> tuple[object, ...]:
    x = torch.empty(rows, columns, device="meta")
    return (x, x, 2.0, 64)


def test_signature_assumes_what_a_launch_would_find() -> None:
    x, y, factor, tile = signature(scale_kernel, arguments(32, 100)).parameters
    assert isinstance(x, ArrayConstraint)
    assert x.stride_constant == (None, 1)
    assert x.shape_divisible_by == (16, 1)
    assert x.stride_divisible_by == (4, 1)
    assert x.index_dtype == ct.int32
    assert y.index_dtype == ct.int64
    assert factor == ScalarConstraint(ct.float32)
    assert tile == ConstantConstraint(64)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_resources_of_a_small_kernel(arch: str) -> None:
    resources = inspect_kernel(scale_kernel, arguments(32, 128), arch)
    assert 0 < resources.registers < 255
    assert not resources.spills
    assert not resources.matrix


def test_a_hinted_kernel_is_one_object() -> None:
    assert hinted(scale_kernel, occupancy=2) is hinted(scale_kernel, occupancy=2)
    assert hinted(scale_kernel, occupancy=2) is not hinted(scale_kernel, occupancy=4)


def test_a_launch_has_the_name_of_its_kernel() -> None:
    assert Launch(scale_kernel, (32,), arguments(32, 128)).name == "scale"
    assert Gpu("sm_90", 132).arch == "sm_90"


@pytest.mark.parametrize(("bulk", "short"), [(1, True), (0, False)])
def test_a_block_that_waits_for_registers_for_ever_is_seen(bulk: int, short: bool) -> None:
    """How many tiles there are is a sum, so warps of their own store, and workers ask for what those keep; one hung."""
    rows, weights = (torch.empty(count, 1792, dtype=torch.float8_e4m3fn, device="meta") for count in (8, 4096))
    counts, out = torch.empty(8, dtype=torch.int32, device="meta"), torch.empty(8, 4096, device="meta")
    kernel = hinted(summed_tiles_kernel, num_worker_warps=4, occupancy=2)
    assert (inspect_kernel(kernel, (rows, weights, counts, out, bulk), "sm_90").shortage > 0) == short
