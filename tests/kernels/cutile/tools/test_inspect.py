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
