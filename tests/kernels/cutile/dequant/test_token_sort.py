import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertd.kernels.cutile.dequant.token_sort import sort_rows

EXPERTS = 8


@st.composite
def expert_ids(draw: st.DrawFn) -> torch.Tensor:
    tokens, slots = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    chosen = torch.rand(tokens, 3 * EXPERTS, generator=generator).topk(slots, dim=1).indices
    chosen = chosen % (3 * EXPERTS)
    return torch.where(chosen < EXPERTS, chosen, -1).to(torch.int32)


@given(ids=expert_ids(), tile_rows=st.sampled_from([1, 4, 64]))
def test_every_pair_has_one_row_of_its_expert(ids: torch.Tensor, tile_rows: int) -> None:
    rows = sort_rows(ids, EXPERTS, min(EXPERTS, ids.numel()), tile_rows)
    assert torch.equal(rows.positions >= 0, ids >= 0)
    used = rows.positions[rows.positions >= 0]
    assert len(used.unique()) == len(used) == int((rows.tokens >= 0).sum())
    for token, slot in (ids >= 0).nonzero().tolist():
        row = int(rows.positions[token, slot])
        tile = row // tile_rows
        assert rows.tokens[row] == token
        assert tile < rows.num_tiles
        assert rows.experts[rows.tile_slots[tile]] == ids[token, slot]
    assert torch.equal(rows.pairs, ids[ids >= 0].bincount(minlength=EXPERTS).to(torch.int32))


@given(ids=expert_ids())
def test_rows_of_an_expert_are_in_the_order_of_the_tokens(ids: torch.Tensor) -> None:
    rows = sort_rows(ids, EXPERTS, min(EXPERTS, ids.numel()), 4)
    tiles = rows.tokens.view(-1, 4)[: int(rows.num_tiles)]
    for slot in range(len(rows.experts)):
        tokens = tiles[rows.tile_slots[: len(tiles)] == slot].flatten()
        tokens = tokens[tokens >= 0]
        assert torch.equal(tokens, tokens.sort().values)


def test_experts_beyond_the_bound_are_not_counted() -> None:
    rows = sort_rows(torch.tensor([[1, 5, -1], [6, 1, 5]], dtype=torch.int32), EXPERTS, 2, 4)
    assert rows.experts.tolist() == [1, 5]
    assert rows.pairs.tolist() == [0, 2, 0, 0, 0, 2, 0, 0]
    assert rows.positions.tolist() == [[0, 4, -1], [-1, 1, 5]]


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_batch_without_local_experts(tokens: int) -> None:
    rows = sort_rows(torch.full((tokens, 3), -1, dtype=torch.int32), EXPERTS, 3, 64)
    assert rows.num_tiles.tolist() == [0]
    assert not (rows.tokens >= 0).any()
    assert not (rows.experts >= 0).any()
    assert not rows.pairs.any()
