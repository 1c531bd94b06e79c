"""How evenly a coordinator's servers are loaded, from what they answered."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.fleet.load import HALF_LIFE, Load
from expertd.client.telemetry.balance import LEAST_PAIRS, balance
from expertd.client.telemetry.metrics import CoordinatorMetrics
from tests.support.coordinators import LAYER, QUICK, tokens
from tests.support.fleets import HALVES, addresses, running_servers, stop
from tests.support.serving import running_server, until


def told(registry: CollectorRegistry) -> dict[str, float]:
    return {
        sample.labels["layer"]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "expertd_coordinator_server_balance_ratio"
    }


def counted(config: CoordinatorConfig) -> tuple[CoordinatorConfig, CollectorRegistry]:
    registry = CollectorRegistry()
    return replace(config, metrics=CoordinatorMetrics(registry)), registry


def test_pairs_count_half_after_a_while_and_by_layer() -> None:
    now = 100.0
    load = Load(lambda: now)
    load.add(3, 80)
    now += HALF_LIFE
    load.add(3, 5)
    load.add(4, 7)
    assert (load.lately(3), load.lately(4), load.lately(5)) == (45, 7, 0)
    now += 1e6 * HALF_LIFE
    assert load.lately(3) == 0


def test_the_worst_layers_are_named_and_all_make_one_figure() -> None:
    ratios = {3: 0.5, 4: 1.0, 5: 0.8, 6: 0.625, 7: 0.9}
    # Of two servers, whose larger load is the same in each layer.
    loads = {("m", layer): {"a": 1000.0, "b": 1000 * (2 * ratio - 1)} for layer, ratio in ratios.items()}
    found = balance([loads])
    assert found.pop("all") == pytest.approx(5 / sum(1 / ratio for ratio in ratios.values()))
    assert found == pytest.approx({"3": 0.5, "6": 0.625, "5": 0.8})


def test_loads_of_several_coordinators_are_added_and_models_are_not() -> None:
    one, other = {("m", 3): {"a": 400.0, "b": 0.0}}, {("m", 3): {"a": 100.0, "b": 500.0}}
    assert balance([one]) == {"all": 0.5, "3": 0.5}
    assert balance([one, other]) == {"all": 1.0, "3": 1.0}
    # Another model's layer of this number, with servers of its own.
    assert balance([one, other, {("n", 3): {"c": 200.0, "d": 50.0}}])["3"] == 0.625


def test_what_chance_makes_uneven_is_not_told() -> None:
    few = {("m", 3): {"a": 2 * LEAST_PAIRS - 2, "b": 0.0}}
    assert balance([few]) == balance([{("m", 3): {"a": 0.0}}]) == balance([]) == {}
    assert balance([{**few, ("m", 4): {"a": 2 * LEAST_PAIRS, "b": 0.0}}]) == {"all": 0.5, "4": 0.5}


@pytest.mark.parametrize("straight", [True, False], ids=["straight", "long"])
async def test_skew_between_servers_is_told_and_a_lost_server_leaves(small_model: Path, straight: bool) -> None:
    # Coordinators that hedge go the long way.
    config, registry = counted(QUICK if straight else replace(QUICK, hedge_quantile=0.999))
    async with running_servers(small_model, HALVES) as servers, Coordinator(addresses(servers), config) as moe:
        # Three of four pairs are the first half's.
        ids = torch.tensor([[0, 1, 2, 8]]).expand(200, 4).contiguous()
        for layer in (LAYER, 2):
            await moe(layer, tokens(200), topk_ids=ids, topk_weights=torch.ones(200, 4))
        found = told(registry)
        assert found == pytest.approx({"all": 2 / 3, "1": 2 / 3, "2": 2 / 3}, rel=0.05)
        await stop(servers[1])
        await until(lambda: told(registry) == {"all": 1.0, "1": 1.0, "2": 1.0})
    assert told(registry) == {}, "nobody is connected"


async def test_servers_of_another_place_do_not_count(small_model: Path) -> None:
    config, registry = counted(replace(QUICK, locality="here"))
    async with (
        running_server(small_model, range(16), locality="here") as near,
        running_server(small_model, range(16), locality="there") as far,
        Coordinator([str(near.address), str(far.address)], config) as moe,
    ):
        ids = torch.tensor([[0, 1, 2, 8]]).expand(50, 4).contiguous()
        await moe(LAYER, tokens(50), topk_ids=ids, topk_weights=torch.ones(50, 4))
        assert told(registry) == {"all": 1.0, "1": 1.0}
