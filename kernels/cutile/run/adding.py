"""What adds up the sums that several GPUs have of the same rows, captured for the native executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import cuda.tile as ct
import torch
from torch import Tensor

from expertd.kernels.cutile.base.launch import Launch
from expertd.kernels.cutile.run.capture import CODES, captured

if TYPE_CHECKING:
    from expertd._native import CudaExecutor

ConstInt = Annotated[int, ct.ConstantAnnotation()]
MOST_PARTS = 8
COLUMNS = 1024
"""Elements of a row that a block adds."""


@ct.kernel
def add_parts_kernel(
    out: ct.IndexedWithInt64[ct.Array],
    first: ct.IndexedWithInt64[ct.Array],
    second: ct.IndexedWithInt64[ct.Array],
    third: ct.IndexedWithInt64[ct.Array],
    fourth: ct.IndexedWithInt64[ct.Array],
    fifth: ct.IndexedWithInt64[ct.Array],
    sixth: ct.IndexedWithInt64[ct.Array],
    seventh: ct.IndexedWithInt64[ct.Array],
    eighth: ct.IndexedWithInt64[ct.Array],
    PARTS: ConstInt,
    WIDTH: ConstInt,
    COLUMNS: ConstInt,
) -> None:
    row = ct.bid(0)
    column = ct.bid(1) * COLUMNS + ct.arange(COLUMNS, dtype=ct.int32)
    mask = column < WIDTH
    total = ct.zeros((COLUMNS,), dtype=ct.float32)
    total = total + ct.gather(first, (row, column), mask=mask, check_bounds=False)
    total = total + ct.gather(second, (row, column), mask=mask, check_bounds=False)
    if PARTS > 2:
        total = total + ct.gather(third, (row, column), mask=mask, check_bounds=False)
    if PARTS > 3:
        total = total + ct.gather(fourth, (row, column), mask=mask, check_bounds=False)
    if PARTS > 4:
        total = total + ct.gather(fifth, (row, column), mask=mask, check_bounds=False)
    if PARTS > 5:
        total = total + ct.gather(sixth, (row, column), mask=mask, check_bounds=False)
    if PARTS > 6:
        total = total + ct.gather(seventh, (row, column), mask=mask, check_bounds=False)
    if PARTS > 7:
        total = total + ct.gather(eighth, (row, column), mask=mask, check_bounds=False)
    ct.scatter(out, (row, column), total.astype(out.dtype), mask=mask, check_bounds=False)


def add_parts(parts: Sequence[Tensor], out: Tensor) -> Launch:
    """Write to `out` [T, H] bfloat16 or float32 the sum of 2 to `MOST_PARTS` [T, H] float32, in their order from 0 on,
    in FP32 and rounded once. A block in the first dimension of the grid takes a row."""
    rows, width = out.shape
    given = [*parts, *[parts[0]] * (MOST_PARTS - len(parts))]
    return Launch(add_parts_kernel, (rows, ct.cdiv(width, COLUMNS)), (out, *given, len(parts), width, COLUMNS))


def capture_adders(executor: CudaExecutor, devices: int, width: int, device: torch.device) -> None:
    """Give an executor what adds up the sums of any number of `devices`, of replies of all dtypes."""
    for count in range(2, min(devices, MOST_PARTS) + 1):
        for dtype in (torch.bfloat16, torch.float32):
            parts = [torch.zeros(1, width, device=device, dtype=torch.float32) for _ in range(count)]
            out = torch.empty(1, width, dtype=dtype, device=device)
            launch = add_parts(parts, out)
            with torch.cuda.stream(torch.cuda.Stream(device)):
                launch()  # compiles: that cannot happen in a capture
                torch.cuda.current_stream(device).synchronize()
                graph = captured(launch)
            result, *ranges = ((one.data_ptr(), one.numel() * one.element_size()) for one in (out, *parts))
            executor.add_adder(CODES[dtype], graph=graph.raw_cuda_graph(), result=result, parts=ranges)
