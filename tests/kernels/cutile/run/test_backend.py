"""What the backend decides on the host."""

import pytest
import torch

from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.pipeline.arithmetic import choose_pipeline
from expertd.kernels.cutile.pipeline.table import Choice, Table
from expertd.kernels.cutile.run.backend import _shape_of
from expertd.kernels.cutile.tools.inputs import random_weights
from expertd.kernels.numerics.backend import UnsupportedShape

SHAPE = ExpertShape()


def measured(**pipelines: str) -> Table:
    table = Table()
    for tokens, pipeline in pipelines.items():
        table.put("pipeline", SHAPE.key(int(tokens.removeprefix("t"))), Choice(pipeline, 1.0))
    return table


@pytest.mark.parametrize(
    ("arch", "table", "expected"),
    [
        ("sm_90", measured(), "fast"),
        ("sm_90", measured(t1="fast", t16384="dequant"), "dequant"),
        ("sm_90", measured(t1="dequant", t16384="fast"), "fast"),
        ("sm_90", measured(t64="dequant"), "dequant"),
        ("sm_80", measured(t16384="fast"), "dequant"),
    ],
    ids=["nothing measured", "largest says dequant", "largest says fast", "only a small class", "no FP8"],
)
def test_the_pipeline_is_the_one_measured_faster_for_the_largest_class(arch: str, table: Table, expected: str) -> None:
    assert choose_pipeline(arch, table, SHAPE) == expected


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (ExpertShape(65, 256, 128), "local experts 65: .* up to 64; share a layer's experts among more servers"),
        (ExpertShape(1, 8320, 128), "hidden size 8320: .* of 128 up to 8192; --backend torch takes any"),
        (ExpertShape(1, 256, 14336), "intermediate size 14336: .* up to 4096; --backend torch takes any"),
    ],
)
def test_shapes_beyond_the_kernels_are_refused_with_what_would_do(shape: ExpertShape, message: str) -> None:
    with pytest.raises(UnsupportedShape, match=message):
        _shape_of(random_weights(shape, torch.device("meta")))


@pytest.mark.parametrize("shape", [ExpertShape(64, 4096, 2048), ExpertShape(48, 7168, 3072)])
def test_deepseek_v4s_sizes_are_taken(shape: ExpertShape) -> None:
    assert _shape_of(random_weights(shape, torch.device("meta"))) == shape
