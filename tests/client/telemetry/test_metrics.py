"""What a coordinator counts while its servers answer, refuse and die."""

from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.telemetry.metrics import CoordinatorMetrics
from expertd.proto.base.errors import InvalidBatch, Overloaded, ServerFault
from tests.support.coordinators import LAYER, QUICK, call, routing, tokens
from tests.support.fleets import flat, running_replicas, stop
from tests.support.serving import running_server


def counted(config: CoordinatorConfig) -> tuple[CoordinatorConfig, CollectorRegistry]:
    registry = CollectorRegistry()
    return replace(config, metrics=CoordinatorMetrics(registry)), registry


def read(registry: CollectorRegistry, name: str, **labels: str) -> float:
    value = registry.get_sample_value(f"expertd_coordinator_{name}", labels)
    assert value is not None, name
    return value


async def test_answered_and_refused_calls_are_counted(small_model: Path) -> None:
    config, registry = counted(QUICK)
    async with running_replicas(small_model) as replicas, Coordinator(flat(replicas), config) as moe:
        for seed in range(3):
            await call(moe, seed, count=20)
        with pytest.raises(InvalidBatch):
            await moe(LAYER, tokens(3), topk_ids=routing(2)[0], topk_weights=routing(2)[1])
    assert read(registry, "calls_total", outcome="ok") == 3
    assert read(registry, "calls_total", outcome="invalid_argument") == 1
    assert read(registry, "tokens_total") == 60
    assert read(registry, "call_duration_seconds_count") == 3
    # Two halves of the experts, each on the less busy of two replicas.
    assert (read(registry, "fan_out_servers_count"), read(registry, "fan_out_servers_sum")) == (3, 6)
    assert read(registry, "retries_total") == read(registry, "failovers_total") == 0


async def test_a_part_that_moves_is_a_retry_and_a_failover(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, registry = counted(QUICK)

    async def fail(*_: object) -> None:
        raise ServerFault("the device failed")

    async with running_replicas(small_model) as replicas, Coordinator(flat(replicas), config) as moe:
        for half in replicas:
            monkeypatch.setattr(half[0].scheduler, "execute", fail)
        for seed in range(10):
            await call(moe, seed)
    assert read(registry, "calls_total", outcome="ok") == 10
    assert read(registry, "retries_total") == read(registry, "failovers_total") >= 1


async def test_a_part_that_waits_for_its_only_owner_is_a_retry_alone(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, registry = counted(replace(QUICK, max_attempts=3))

    async def refuse(*_: object) -> None:
        raise Overloaded("always full")

    async with running_server(small_model, range(16)) as server:
        monkeypatch.setattr(server.scheduler, "execute", refuse)
        async with Coordinator([str(server.address)], config) as moe:
            with pytest.raises(Overloaded):
                await call(moe)
    assert read(registry, "calls_total", outcome="resource_exhausted") == 1
    assert (read(registry, "retries_total"), read(registry, "failovers_total")) == (2, 0)


async def test_tokens_without_some_of_their_experts_are_counted(small_model: Path) -> None:
    config, registry = counted(replace(QUICK, on_missing="renormalize"))
    async with (
        running_server(small_model, range(8)) as kept,
        running_server(small_model, range(8, 16)) as lost,
        Coordinator([str(kept.address), str(lost.address)], config) as moe,
    ):
        await call(moe)
        assert read(registry, "degraded_tokens_total") == 0
        await stop(lost)
        ids, weights = routing(30)
        result = await moe.execute(LAYER, tokens(30), topk_ids=ids, topk_weights=weights)
    assert read(registry, "degraded_tokens_total") == result.degraded_tokens > 0
    assert read(registry, "tokens_total") == 50


def test_what_calls_spent_is_added_up() -> None:
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    metrics.spent(retries=3, failovers=2, hedges=1)
    metrics.spent(retries=1, failovers=0, hedges=4)
    assert [read(registry, f"{name}_total") for name in ("retries", "failovers", "hedges")] == [4, 2, 5]


def test_coordinators_that_export_nothing_do_not_collide() -> None:
    assert CoordinatorConfig().metrics is not CoordinatorConfig().metrics
    assert CoordinatorConfig() == CoordinatorConfig()
