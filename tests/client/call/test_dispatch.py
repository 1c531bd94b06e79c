"""Planning: every (token, expert) pair goes to exactly one server, and receipts prove it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertd.client.call.dispatch import Dispatch, check_receipt, combine, contributions, plan_dispatch
from expertd.proto.base.errors import ServerFault
from expertd.proto.codec import ExecuteResult, StageTimings

EXPERTS = 16


def random_ids(tokens: int, top_k: int, seed: int, absent: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :top_k].int()
    return ids.masked_fill(torch.rand(tokens, top_k, generator=generator) < absent, -1)


def pairs_of(ids: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor) -> list[tuple[int, int, float]]:
    rows, columns = (ids >= 0).nonzero(as_tuple=True)
    return [
        (int(tokens[row]), int(ids[row, column]), float(weights[row, column]))
        for row, column in zip(rows, columns, strict=True)
    ]


@given(
    tokens=st.integers(1, 40),
    top_k=st.integers(1, 6),
    servers=st.integers(1, 5),
    shares=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    absent=st.sampled_from([0.0, 0.3, 1.0]),
    part=st.integers(1, 50),
)
def test_every_pair_goes_to_its_owner_exactly_once(
    tokens: int, top_k: int, servers: int, shares: int, seed: int, absent: float, part: int
) -> None:
    ids = random_ids(tokens, top_k, seed, absent)
    weights = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(seed))
    owner = torch.randint(servers, (shares, EXPERTS), generator=torch.Generator().manual_seed(seed + 1))
    parts = [piece for whole in plan_dispatch(ids, weights, owner) for piece in whole.split(part)]
    sent = [(piece.server, pair) for piece in parts for pair in pairs_of(piece.expert_ids, piece.weights, piece.tokens)]
    assert sorted(pair for _, pair in sent) == sorted(pairs_of(ids, weights, torch.arange(tokens)))
    assert all(server == owner[token * shares // tokens, expert] for server, (token, expert, _) in sent)
    for piece in parts:
        assert 1 <= len(piece.tokens) <= part
        assert (piece.expert_ids >= 0).any(dim=1).all(), "no token travels for nothing"
        assert (piece.weights[piece.expert_ids < 0] == 0).all()


def test_a_group_limited_token_goes_to_one_server_a_group() -> None:
    owner = torch.arange(256)[None] // 32
    ids = torch.tensor([[0, 1, 33, 34, 65, 66, 97, 98]], dtype=torch.int32)
    assert [d.server for d in plan_dispatch(ids, torch.ones(1, 8), owner)] == [0, 1, 2, 3]


def example_dispatch() -> Dispatch:
    ids = torch.tensor([[4, 5], [5, -1]], dtype=torch.int32)
    return Dispatch(torch.tensor([0, 3]), ids, torch.ones(2, 2), server=0)


@pytest.mark.parametrize(
    ("receipt", "complaint"),
    [
        ({}, "expert 4: 1 pairs sent, 0 computed, expert 5: 2 pairs sent, 0 computed"),
        ({4: 1, 5: 1}, "expert 5: 2 pairs sent, 1 computed"),
        ({4: 1, 5: 3}, "expert 5: 2 pairs sent, 3 computed"),
        ({4: 1, 5: 2, 6: 1}, "expert 6: 0 pairs sent, 1 computed"),
    ],
    ids=["nothing", "one dropped", "one doubled", "one invented"],
)
def test_a_receipt_that_does_not_match_is_an_error_naming_the_experts(receipt: dict[int, int], complaint: str) -> None:
    with pytest.raises(ServerFault, match=rf"host:1: the receipt does not match the request: {complaint}$"):
        check_receipt(example_dispatch(), receipt, "host:1")


def test_the_matching_receipt_passes() -> None:
    check_receipt(example_dispatch(), {5: 2, 4: 1}, "host:1")


def test_combine_adds_in_float32_where_the_tokens_belong() -> None:
    one = example_dispatch()
    two = Dispatch(torch.tensor([3]), torch.tensor([[9, -1]], dtype=torch.int32), torch.ones(1, 2), server=1)
    small = torch.full((1, 4), 2.0**-12)
    parts = [
        (one, ExecuteResult(1, torch.ones(2, 4).bfloat16(), {}, StageTimings())),
        (two, ExecuteResult(2, small, {}, StageTimings())),
    ]
    sums = torch.empty(5, 4)
    for block, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
        combine(sums[rows], contributions(parts, 5, block_tokens=2)[block])
    assert sums.dtype == torch.float32
    expected = torch.zeros(5, 4)
    expected[0], expected[3] = 1.0, 1.0 + 2.0**-12
    assert torch.equal(sums, expected)
