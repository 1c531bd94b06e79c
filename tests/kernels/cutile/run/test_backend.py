"""What the backend decides on the host."""

import pytest
import torch

from expertd.kernels.cutile.base.shape import ExpertShape, tokens_within_reach
from expertd.kernels.cutile.fast.layer import Workspace
from expertd.kernels.cutile.pipeline.arithmetic import MAX_TILE_ROWS, choose_pipeline
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
        (ExpertShape(1, 256, 16512), "intermediate size 16512: .* up to 16384; --backend torch takes any"),
    ],
)
def test_shapes_beyond_the_kernels_are_refused_with_what_would_do(shape: ExpertShape, message: str) -> None:
    with pytest.raises(UnsupportedShape, match=message):
        _shape_of(random_weights(shape, torch.device("meta")))


@pytest.mark.parametrize(
    "shape",
    [
        ExpertShape(64, 4096, 2048),
        ExpertShape(48, 7168, 3072),
        ExpertShape(8, 4096, 14336),
        ExpertShape(8, 6144, 16384),
        ExpertShape(16, 5120, 8192),
    ],
    ids=["DeepSeek-V4-Flash", "DeepSeek-V4-Pro", "Mixtral-8x7B", "Mixtral-8x22B", "of Llama-4"],
)
def test_published_sizes_are_taken(shape: ExpertShape) -> None:
    assert _shape_of(random_weights(shape, torch.device("meta"))) == shape


@pytest.mark.parametrize(
    ("shape", "top_k", "tokens"),
    [
        (ExpertShape(64, 8192, 4096), 8, 16384),
        (ExpertShape(8, 4096, 14336), 2, 16384),
        (ExpertShape(8, 6144, 16384), 8, 4096),
        (ExpertShape(64, 256, 128), 64, 16384),
    ],
)
def test_as_many_tokens_are_computed_at_once_as_32_bit_offsets_reach(
    shape: ExpertShape, top_k: int, tokens: int
) -> None:
    assert tokens_within_reach(shape, top_k) == tokens
    weights = random_weights(shape, torch.device("meta"))
    assert Workspace.allocate(tokens, top_k, weights, MAX_TILE_ROWS, "meta").rows.shape[1] == shape.hidden_size
