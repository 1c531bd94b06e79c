"""The torch backend against the oracle."""

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import dequantize_activations
from expertd.kernels.numerics.token_sort import sort_pairs
from expertd.kernels.oracle.reference import reference_partials, relative_error
from expertd.kernels.torch.backend import TorchBackend
from tests.support.serving import matrices_of, random_batch, random_weights

EXPERTS, HIDDEN, INNER, TOP_K, LAYER = 8, 256, 128, 4, 3
WEIGHTS = random_weights(EXPERTS, HIDDEN, INNER)


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    backend = TorchBackend()
    backend.load_layer(LAYER, WEIGHTS)
    return backend


def rows(batch: TokenBatch, index: torch.Tensor) -> TokenBatch:
    scales = None if batch.scales is None else batch.scales[index]
    return TokenBatch(batch.hidden[index], scales, batch.expert_ids[index], batch.weights[index])


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 64, 257])
@pytest.mark.parametrize("quantized", [True, False], ids=["fp8", "bf16"])
def test_agrees_with_the_oracle(backend: TorchBackend, tokens: int, quantized: bool) -> None:
    batch = random_batch(tokens, HIDDEN, EXPERTS, TOP_K, seed=tokens)
    if not quantized:
        batch = replace(batch, hidden=torch.randn(tokens, HIDDEN).bfloat16(), scales=None)
    partials = backend.execute(LAYER, batch)
    assert partials.sums.dtype == torch.float32
    assert relative_error(partials.sums, reference_partials(batch, WEIGHTS)) < 1e-6
    expected = [int((batch.expert_ids == expert).sum()) for expert in range(EXPERTS)]
    assert partials.pairs.tolist() == expected


@pytest.mark.parametrize("limit", [0.05, 1.0, 1e4])
def test_a_bound_holds_the_gate_from_above_and_up_on_both_sides(limit: float) -> None:
    batch = random_batch(40, HIDDEN, EXPERTS, TOP_K, seed=8)
    backend, bounded = TorchBackend(), replace(WEIGHTS, swiglu_limit=limit)
    backend.load_layer(LAYER, bounded)
    sums = backend.execute(LAYER, batch).sums
    assert relative_error(sums, reference_partials(batch, bounded)) < 1e-6
    expected = torch.zeros_like(sums)
    for expert in range(EXPERTS):
        matrices = matrices_of(WEIGHTS, expert)
        assert batch.scales is not None
        hidden = dequantize_activations(batch.hidden, batch.scales)
        up, gate = hidden @ matrices.up.T, hidden @ matrices.gate.T
        gate, up = torch.where(gate > limit, limit, gate), torch.where(up.abs() > limit, up.sign() * limit, up)
        weight = torch.where(batch.expert_ids == expert, batch.weights, 0).sum(dim=1, keepdim=True)
        expected += (gate / (1 + (-gate).exp()) * up) @ matrices.down.T * weight
    assert relative_error(sums, expected) < 1e-5
    plain = TorchBackend()
    plain.load_layer(LAYER, WEIGHTS)
    # Nothing here is as large as ten thousand.
    assert torch.equal(sums, plain.execute(LAYER, batch).sums) == (limit == 1e4)


def test_a_layer_with_other_experts_keeps_its_bound() -> None:
    batch = random_batch(9, HIDDEN, EXPERTS, TOP_K, seed=2)
    backend = TorchBackend()
    backend.load_layer(LAYER, replace(WEIGHTS, swiglu_limit=0.1))
    parts = (WEIGHTS.up_gate, WEIGHTS.up_gate_scales, WEIGHTS.down, WEIGHTS.down_scales)
    none = LayerWeights(*(tensor[:0] for tensor in parts), swiglu_limit=0.1)
    backend.splice_layer(1, LAYER, {expert: expert for expert in range(EXPERTS)}, none)
    assert torch.equal(backend.execute(1, batch).sums, backend.execute(LAYER, batch).sums)


@pytest.mark.parametrize("expert", [0, EXPERTS - 1])
def test_all_tokens_on_one_expert(backend: TorchBackend, expert: int) -> None:
    batch = random_batch(40, HIDDEN, EXPERTS, 1, absent=0.0)
    batch = replace(batch, expert_ids=torch.full_like(batch.expert_ids, expert))
    partials = backend.execute(LAYER, batch)
    assert relative_error(partials.sums, reference_partials(batch, WEIGHTS)) < 1e-6
    assert partials.pairs[expert] == 40


def test_tokens_without_experts_get_exact_zeros(backend: TorchBackend) -> None:
    batch = random_batch(5, HIDDEN, EXPERTS, TOP_K)
    batch.expert_ids[3] = -1
    sums = backend.execute(LAYER, batch).sums
    assert not sums[3].any()
    assert sums[[0, 1, 2, 4]].any(dim=1).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), others=st.integers(0, 70), data=st.data())
def test_the_bits_of_a_token_do_not_depend_on_its_batch(
    backend: TorchBackend, seed: int, others: int, data: st.DataObject
) -> None:
    batch = random_batch(others + 1, HIDDEN, EXPERTS, TOP_K, seed=seed)
    token = data.draw(st.integers(0, others))
    order = torch.randperm(others + 1, generator=torch.Generator().manual_seed(seed))
    alone = backend.execute(LAYER, rows(batch, torch.tensor([token]))).sums[0]
    assert torch.equal(backend.execute(LAYER, batch).sums[token], alone)
    shuffled = backend.execute(LAYER, rows(batch, order)).sums[order.tolist().index(token)]
    assert torch.equal(shuffled, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_requests_get_the_bits_of_single_ones_where_they_want_them(
    backend: TorchBackend, dtype: torch.dtype
) -> None:
    requests = [random_batch(tokens, HIDDEN, EXPERTS, TOP_K, seed=tokens) for tokens in (3, 1, 30)]
    requests[1] = replace(requests[1], reply=torch.full((1, HIDDEN), torch.nan, dtype=dtype))
    computed = backend.submit(LAYER, requests, dtype).result()
    alone = [backend.execute(LAYER, request) for request in requests]
    for sums, partials in zip(computed.sums, alone, strict=True):
        assert torch.equal(sums, partials.sums.to(dtype))
    assert computed.sums[1] is requests[1].reply
    assert torch.equal(computed.pairs, torch.stack([partials.pairs for partials in alone]).sum(dim=0))


def test_sorted_pairs_are_by_expert_then_token() -> None:
    ids = torch.tensor([[2, -1, 0], [0, 2, -1], [-1, -1, -1], [1, 0, 2]], dtype=torch.int32)
    order = sort_pairs(ids, num_experts=4)
    assert order.counts.tolist() == [3, 1, 3, 0]
    pairs = int(order.counts.sum())
    assert order.tokens[:pairs].tolist() == [0, 1, 3, 3, 0, 1, 3]
    assert ids.reshape(-1)[order.choices[:pairs]].tolist() == [0, 0, 0, 1, 2, 2, 2]


def test_64_tokens_on_32_experts_take_well_under_50_ms() -> None:
    backend = TorchBackend()
    backend.load_layer(0, random_weights(32, 512, 256))
    batch = random_batch(64, 512, 256, 8, absent=0.0)
    batch = replace(batch, expert_ids=torch.where(batch.expert_ids < 32, batch.expert_ids, -1))
    backend.execute(0, batch)
    seconds = []
    for _ in range(15):
        started = time.perf_counter()
        backend.execute(0, batch)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.05
