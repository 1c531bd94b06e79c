"""What the fast pipeline launches, seen without a GPU."""

import math

import pytest
import torch

from expertd.kernels.cutile.base.launch import Gpu, Launch
from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.fast.layer import Workspace, layer_launches
from expertd.kernels.cutile.fast.tiles import default_config
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.cutile.tools.registry import META, V3, fast_launches

H200 = Gpu("sm_90", processors=132)
ACTIVATIONS = ("swiglu_quantize", "swiglu_one_token", "gemm1_few_rows", "gemm1_wide")


def launched(tokens: int, shape: ExpertShape = V3) -> list[Launch]:
    return fast_launches(shape, tokens, default_config(H200.arch, tokens), META, H200)


def names(tokens: int) -> list[str]:
    return [launch.name for launch in launched(tokens)]


def parts(shape: ExpertShape) -> int:
    """Of the first product of one token."""
    return int(launched(1, shape)[0].args[5].shape[0])


def test_one_token_is_not_sorted() -> None:
    assert names(1) == ["gemm1_one_token", "swiglu_one_token", "gemm2_one_token"]


def test_all_kernels_of_one_token_but_the_first_overlap_with_the_one_before() -> None:
    assert [launch.overlaps for launch in launched(1)] == [False, True, True]
    assert not any(launch.overlaps for launch in launched(64))


def test_one_token_with_more_choices_than_there_is_room_for_is_sorted() -> None:
    shape, config = ExpertShape(5, 384, 128), default_config(H200.arch, 1)
    weights, batch = random_weights(shape, META), random_batch(shape, 1, META, top_k=17)
    sums = torch.empty(1, shape.hidden_size, device=META)
    workspace = Workspace.allocate(1, 17, weights, config.tile_rows, META)
    launches = layer_launches(batch, weights, sums, workspace, config, H200.processors)
    assert launches[0].name == "place_pairs"


@pytest.mark.parametrize("tokens", [1, 64, 1024, 4096])
def test_the_bound_of_the_weights_is_that_of_the_activation(tokens: int) -> None:
    for limit, constant in ((None, math.inf), (10.0, 10.0)):
        launches = fast_launches(V3, tokens, default_config(H200.arch, tokens), META, H200, limit)
        found = [launch.args[-1] for launch in launches if launch.name in ACTIVATIONS]
        assert found == [constant]


def test_an_odd_number_of_blocks_is_not_split() -> None:
    assert parts(V3) == 4
    assert parts(ExpertShape(8, 2176, 640)) == 1


def test_many_tokens_are_counted_first() -> None:
    assert names(4096) == [
        "count_pairs",
        "place_pairs",
        "gather_rows",
        "fp8_gemm",
        "swiglu_quantize",
        "fp8_gemm",
        "combine",
    ]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_leave_the_columns_one_after_another(steps: int) -> None:
    config = default_config(H200.arch, 4096)
    whole = fast_launches(V3, 4096, config, META, H200)
    cut = fast_launches(V3, 4096, config, META, H200, steps=steps)
    assert [launch.name for launch in cut] == [launch.name for launch in whole[:-2]] + steps * ["fp8_gemm", "combine"]
    share = V3.hidden_size // steps
    for step, (product, sums) in enumerate(zip(cut[-2 * steps :: 2], cut[-2 * steps + 1 :: 2], strict=True)):
        _, _, down, down_scales, *_, out = product.args[:7]
        assert down.shape == (32, share, 2048)
        assert down_scales.shape == (32, share // 128, 16)
        rows, *_, into = sums.args[:4]
        assert [tensor.storage_offset() for tensor in (out, rows, into)] == 3 * [step * share]
        assert (out.shape[1], rows.shape[1], into.shape) == (share, share, (4096, share))


def test_a_thousand_tokens_have_their_activation_in_the_first_product() -> None:
    assert names(1024) == ["count_pairs", "place_pairs", "gather_rows", "gemm1_wide", "fp8_gemm", "combine"]


def test_grids_of_products_fit_the_device() -> None:
    for tokens in (1, 64, 1024, 16384):
        config = default_config(H200.arch, tokens)
        most = 132 * max(config.gemm1.occupancy, config.gemm2.occupancy)
        launches = fast_launches(V3, tokens, config, META, H200)
        assert all(launch.grid[0] <= most for launch in launches if "gemm" in launch.name)


def test_a_workspace_beyond_32_bit_offsets_is_refused() -> None:
    weights = random_weights(ExpertShape(2, 8192, 128), torch.device("meta"))
    Workspace.allocate(65536, 2, weights, 128, "meta")
    with pytest.raises(ValueError, match="32-bit"):
        Workspace.allocate(262144, 2, weights, 128, "meta")
