"""Large batches, whose experts' copies share the tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertd.client.call import choice
from expertd.client.coordinator import Coordinator
from expertd.kernels.oracle.reference import relative_error
from tests.support.coordinators import LAYER, QUICK, expected, routing, tokens
from tests.support.fleets import addresses, flat, running_replicas, running_servers, stop

ALL = range(16)
WAYS = pytest.mark.parametrize("straight", [True, False], ids=["straight", "long"])
COUNT = 40


@pytest.fixture(autouse=True)
def small_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "SHARE_TOKENS", 16)


@WAYS
async def test_replicas_compute_half_of_the_tokens_each_to_the_same_bits(small_model: Path, straight: bool) -> None:
    # Coordinators that hedge go the long way.
    config = QUICK if straight else replace(QUICK, hedge_quantile=0.999)
    ids, weights = routing(COUNT)
    async with (
        running_replicas(small_model) as replicas,
        Coordinator(flat(replicas), config) as moe,
        Coordinator([str(half[0].address) for half in replicas], config) as alone,
    ):
        result = await moe.execute(LAYER, tokens(COUNT), topk_ids=ids, topk_weights=weights)
        whole = await alone(LAYER, tokens(COUNT), topk_ids=ids, topk_weights=weights)
    assert torch.equal(result.output, whole)
    assert len(result.servers) == 4
    assert sum(report.pairs for report in result.servers) == int((ids >= 0).sum())
    by_address = {report.address: report.pairs for report in result.servers}
    for place, half in enumerate(replicas):
        of_half = [ids[:20], ids[20:]]
        wanted = [int(((rows >= 8 * place) & (rows < 8 * place + 8)).sum()) for rows in of_half]
        assert sorted(by_address[str(server.address)] for server in half) == sorted(wanted)


@WAYS
async def test_copies_of_some_experts_are_added_once(small_model: Path, straight: bool) -> None:
    config = QUICK if straight else replace(QUICK, hedge_quantile=0.999)
    ids, weights = routing(COUNT)
    right = expected(small_model, count=COUNT)
    async with (
        running_servers(small_model, (range(10), range(6, 16), range(4, 12))) as servers,
        Coordinator(addresses(servers), config) as moe,
    ):
        for _ in range(5):
            result = await moe.execute(LAYER, tokens(COUNT), topk_ids=ids, topk_weights=weights)
            assert relative_error(result.output, right) < 1e-5
            assert sum(report.pairs for report in result.servers) == int((ids >= 0).sum())


async def test_a_share_whose_server_dies_is_computed_by_the_other_copy(small_model: Path) -> None:
    ids, weights = routing(COUNT)
    right = expected(small_model, count=COUNT)
    async with running_servers(small_model, (ALL, ALL)) as servers, Coordinator(addresses(servers), QUICK) as moe:
        assert len((await moe.execute(LAYER, tokens(COUNT), topk_ids=ids, topk_weights=weights)).servers) == 2
        await stop(servers[0])
        result = await moe.execute(LAYER, tokens(COUNT), topk_ids=ids, topk_weights=weights)
        assert relative_error(result.output, right) < 1e-5
        assert {report.address for report in result.servers} == {str(servers[1].address)}
