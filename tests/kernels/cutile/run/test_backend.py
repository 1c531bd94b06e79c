"""What the backend decides on the host."""

import pytest

from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.pipeline.arithmetic import choose_pipeline
from expertd.kernels.cutile.pipeline.table import Choice, Table

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
