"""What the backend decides on the host."""

import pytest
import torch

from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.pipeline.arithmetic import choose_pipeline
from expertd.kernels.cutile.pipeline.table import Choice, Table
from expertd.kernels.cutile.run.staging import ALIGNMENT, BatchShape, Results

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


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 256])
def test_a_layout_packs_a_batch_without_overlap_and_ends_with_the_hidden_states(
    tokens: int, dtype: torch.dtype
) -> None:
    shape = BatchShape(tokens, top_k=3, hidden_size=384, dtype=dtype)
    memory = torch.full((shape.num_bytes(tokens),), 255, dtype=torch.uint8)
    batch = shape.batch(memory)
    parts = [part for part in (batch.expert_ids, batch.weights, batch.scales, batch.hidden) if part is not None]
    assert [tuple(part.shape) for part in parts] == [(tokens, 3), (tokens, 3), (tokens, 3), (tokens, 384)][
        -len(parts) :
    ]
    for part in parts:
        assert (part.data_ptr() - memory.data_ptr()) % ALIGNMENT == 0
        assert part.view(torch.uint8).min() == 255, "not written by another part"
        part.view(torch.uint8).zero_()
    assert batch.hidden.view(torch.uint8).view(-1)[-1:].data_ptr() == memory[-1:].data_ptr()
    assert shape.num_bytes(0) == batch.hidden.data_ptr() - memory.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_lie_in_one_stretch(dtype: torch.dtype) -> None:
    results = Results.allocate(5, num_experts=7, hidden_size=128, device=torch.device("cpu")).used(3, dtype)
    results.pairs.copy_(torch.arange(7))
    results.sums(dtype).fill_(1.5)
    assert results.pairs.tolist() == list(range(7))
    assert results.sums(dtype).shape == (3, 128)
    assert results.sums(dtype)[-1, -1:].data_ptr() + dtype.itemsize == results.memory[-1:].data_ptr() + 1
