"""What a coordinator counts while its servers answer, refuse and die."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics import exposition as openmetrics

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.telemetry.attempts import MOST_SERVERS
from expertd.client.telemetry.metrics import WHERE, CoordinatorMetrics, Waited
from expertd.proto.base.errors import InvalidBatch, Overloaded, ServerFault
from expertd.server.rpc.incoming import Incoming
from tests.support.coordinators import LAYER, QUICK, call, routing, tokens
from tests.support.fleets import HALVES, addresses, flat, running_replicas, running_servers, stop
from tests.support.serving import Answers, Gate, running_server, until

ALL = range(16)


async def call_in_vain(model: Path, config: CoordinatorConfig) -> str:
    """Call a server that is always full; its address."""

    async def refuse(*_: object) -> bytes:
        raise Overloaded("always full")

    async with running_server(model, range(16)) as server:
        Answers(server, refuse)
        async with Coordinator([str(server.address)], config) as moe:
            with pytest.raises(Overloaded):
                await call(moe)
        return str(server.address)


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
    config, registry = counted(replace(QUICK, shared_memory_bytes=0))

    async def fail(*_: object) -> bytes:
        raise ServerFault("the device failed")

    async with running_replicas(small_model) as replicas, Coordinator(flat(replicas), config) as moe:
        for half in replicas:
            Answers(half[0], fail)
        for seed in range(10):
            await call(moe, seed)
    assert read(registry, "calls_total", outcome="ok") == 10
    assert read(registry, "retries_total") == read(registry, "failovers_total") >= 1


async def test_a_part_that_waits_for_its_only_owner_is_a_retry_alone(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, registry = counted(replace(QUICK, max_attempts=3, shared_memory_bytes=0))
    await call_in_vain(small_model, config)
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


async def test_experts_without_an_owner_are_counted_until_they_have_one_again(small_model: Path) -> None:
    config, registry = counted(replace(QUICK, on_missing="renormalize"))
    async with running_server(small_model, ALL) as whole:
        async with (
            running_server(small_model, range(8)) as kept,
            running_server(small_model, range(8, 16)) as lost,
            Coordinator([str(kept.address), str(lost.address)], config) as moe,
        ):
            await call(moe)
            assert read(registry, "ownerless_experts") == 0
            await stop(lost)
            await until(lambda: read(registry, "ownerless_experts") == 8 * len(moe.layers))
        assert read(registry, "ownerless_experts") == 0, "nobody is connected"
        async with (
            running_server(small_model, range(8)) as lost,
            Coordinator([str(whole.address), str(lost.address)], config) as moe,
        ):
            await stop(lost)
            await until(lambda: sum(one.in_use for one in moe._connected().membership.members.values()) == 1)
            assert read(registry, "ownerless_experts") == 0, "another range covers them"


def test_latencies_are_told_apart_by_the_size_of_calls() -> None:
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    for size in (1, 8, 9, 128, 2048, 100_000):
        metrics.answered(size, 0, 0.02, Waited(0.02, 0.0, 0.0), "")
    sizes = {"1-8": 2, "9-128": 2, "129-2048": 1, "2049+": 1}
    name = "sized_call_duration_seconds"
    assert {size: read(registry, f"{name}_count", tokens=size) for size in sizes} == sizes
    assert read(registry, f"{name}_bucket", tokens="1-8", le="0.01") == 0
    assert read(registry, f"{name}_bucket", tokens="1-8", le="0.025") == 2


def attempts(registry: CollectorRegistry, part: str = "count") -> dict[tuple[str, str, str], float]:
    """By server, transport and outcome."""
    return {
        (sample.labels["server"], sample.labels["transport"], sample.labels["outcome"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == f"expertd_coordinator_attempt_duration_seconds_{part}"
    }


@pytest.mark.parametrize("transport", ["grpc", "shared_memory"])
@pytest.mark.parametrize("hedged", [False, True])
async def test_attempts_are_told_by_server_and_transport(small_model: Path, transport: str, hedged: bool) -> None:
    # Coordinators that hedge go the long way.
    quick = replace(QUICK, hedge_quantile=0.999 if hedged else None)
    config, registry = counted(quick if transport == "shared_memory" else replace(quick, shared_memory_bytes=0))
    async with running_servers(small_model, HALVES) as servers, Coordinator(addresses(servers), config) as moe:
        for seed in range(3):
            await call(moe, seed)
    assert attempts(registry) == {(address, transport, "ok"): 3 for address in addresses(servers)}
    assert all(0 < seconds < 60 for seconds in attempts(registry, "sum").values())


async def test_a_slow_link_is_seen_and_the_time_is_the_networks(small_model: Path) -> None:
    config, registry = counted(replace(QUICK, shared_memory_bytes=0))

    async def late(incoming: Incoming) -> bytes:
        await asyncio.sleep(0.2)
        return await answers.real(incoming)

    async with running_servers(small_model, HALVES) as servers, Coordinator(addresses(servers), config) as moe:
        fast, slow = servers
        answers = Answers(slow, late)
        for seed in range(3):
            await call(moe, seed)
    seconds = attempts(registry, "sum")
    assert seconds[str(slow.address), "grpc", "ok"] > 0.6 > seconds[str(fast.address), "grpc", "ok"]
    where = {name: read(registry, "time_seconds_total", where=name) for name in WHERE}
    assert where["network"] > 0.6
    assert sum(where.values()) == pytest.approx(read(registry, "call_duration_seconds_sum"), rel=0.01)


async def test_failed_attempts_are_told_by_their_status(small_model: Path) -> None:
    config, registry = counted(replace(QUICK, max_attempts=3, shared_memory_bytes=0))
    address = await call_in_vain(small_model, config)
    assert attempts(registry) == {(address, "grpc", "resource_exhausted"): 3}


async def test_attempts_that_were_given_up_are_told(small_model: Path) -> None:
    config, registry = counted(replace(QUICK, shared_memory_bytes=0))

    async def hang(*_: object) -> bytes:
        await asyncio.sleep(3600)
        return b""

    async with running_server(small_model, range(16)) as server:
        Answers(server, hang)
        async with Coordinator([str(server.address)], config) as moe:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(call(moe), 0.2)
    assert attempts(registry) == {(str(server.address), "grpc", "cancelled"): 1}


@pytest.mark.parametrize("transport", ["grpc", "shared_memory"])
async def test_what_a_thread_gave_up_is_told_as_cancelled(
    small_model: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd.client.call.routed.LONG_ELEMENTS", 0)
    config, registry = counted(QUICK if transport == "shared_memory" else replace(QUICK, shared_memory_bytes=0))
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], config) as moe:
        gate = Gate(server)
        calling = asyncio.create_task(call(moe))
        await until(lambda: bool(gate.reached))
        calling.cancel()
        await until(lambda: bool(attempts(registry)))
        gate.open()
        assert attempts(registry) == {(str(server.address), transport, "cancelled"): 1}


def test_servers_that_were_asked_long_ago_are_forgotten() -> None:
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    for number in range(MOST_SERVERS + 50):
        metrics.attempts.ended(f"host{number}", "grpc", "ok", 0.1, "")
        metrics.attempts.ended("kept", "grpc", "ok", 0.1, "")
    found = {server for server, _, _ in attempts(registry)}
    assert len(found) == MOST_SERVERS
    assert {"kept", f"host{MOST_SERVERS + 49}"} <= found
    assert "host0" not in found


def test_attempts_and_calls_name_their_traces() -> None:
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    for trace in ("", "ab" * 16):
        metrics.attempts.ended("host", "grpc", "ok", 0.2, trace)
        metrics.answered(1, 0, 0.3, Waited(0.2, 0.0, 0.1), trace)
    text = openmetrics.generate_latest(registry).decode()  # type: ignore[no-untyped-call]
    named = [line for line in text.splitlines() if f'# {{trace_id="{"ab" * 16}"}}' in line]
    assert [line.partition("{")[0] for line in named] == [
        "expertd_coordinator_call_duration_seconds_bucket",
        "expertd_coordinator_attempt_duration_seconds_bucket",
    ]


def test_what_calls_spent_is_added_up() -> None:
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    metrics.spent(retries=3, failovers=2, hedges=1)
    metrics.spent(retries=1, failovers=0, hedges=4)
    assert [read(registry, f"{name}_total") for name in ("retries", "failovers", "hedges")] == [4, 2, 5]


def test_coordinators_that_export_nothing_do_not_collide() -> None:
    assert CoordinatorConfig().metrics is not CoordinatorConfig().metrics
    assert CoordinatorConfig() == CoordinatorConfig()


async def test_what_is_counted_later_is_in_the_next_scrape_and_counted_once() -> None:
    registry = CollectorRegistry()
    metrics, name = CoordinatorMetrics(registry), "expertd_coordinator_tokens_total"

    def answer(size: int) -> None:
        metrics.later(lambda: metrics.answered(size, 0, 0.02, Waited(0.02, 0.0, 0.0), ""))

    answer(3)
    assert registry.get_sample_value(name) == 3
    answer(4)
    await asyncio.sleep(0)
    assert metrics._tokens._value.get() == 7, "the event loop has counted it, without a scrape"
    assert registry.get_sample_value(name) == 7
