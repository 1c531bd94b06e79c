"""A device that fails or stops answering: who is told what, and how the server ends."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd.client.tools.cluster import LocalCluster
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.kernels.numerics.backend import TokenBatch, Underway
from expertd.kernels.torch.backend import TorchBackend
from expertd.proto.codec import ShardInfo
from expertd.server.app import Server
from expertd.server.failpoints import VARIABLE
from expertd.server.scheduling.node import Device, Node
from expertd.server.scheduling.watchdog import DeviceLost, Watchdog
from tests.support.serving import execute_method, open_channel, random_batch, request_for, running_server, until

TIMEOUT = 1.0
EXPERTS = range(16)
STATUS = health_pb2.HealthCheckResponse


def batch() -> TokenBatch:
    return random_batch(3, 256, 16, 4)


async def outcomes(execute: Any, server: Server | ShardInfo, count: int) -> set[str]:  # noqa: ANN401
    """Status and message of `count` calls at once, all of which fail."""

    async def outcome(number: int) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await execute(request_for(server, batch(), request_id=number))
        return f"{caught.value.code().name}: {caught.value.details()}"

    return set(await asyncio.gather(*map(outcome, range(count))))


async def test_a_stuck_device_turns_health_down_answers_who_waits_and_serves_again_when_it_answers(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, f"stuck_device=1:{1.6 * TIMEOUT}")
    async with (
        running_server(small_model, EXPERTS, device_timeout=TIMEOUT) as server,
        open_channel(server) as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == STATUS.SERVING
        started = time.monotonic()
        refused = await outcomes(execute_method(channel), server, 5)
        assert time.monotonic() - started < 1.5 * TIMEOUT, "answered by the watchdog, not by the device"
        assert refused == {"UNAVAILABLE: the device has not answered for 1 s; use another replica"}
        assert (await watch.read()).status == STATUS.NOT_SERVING
        assert (await watch.read()).status == STATUS.SERVING
        watch.cancel()


async def test_a_condemned_server_does_not_serve_again_when_its_device_answers(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, f"stuck_device=1:{1.6 * TIMEOUT}")
    async with (
        running_server(small_model, EXPERTS, device_timeout=TIMEOUT) as server,
        open_channel(server) as channel,
    ):
        assert await outcomes(execute_method(channel), server, 1) == {
            "UNAVAILABLE: the device has not answered for 1 s; use another replica"
        }
        server.watchdog.condemn("the GPU had an error")
        await until(lambda: "the device answers again" in caplog.text)
        refused = await outcomes(execute_method(channel), server, 1)
        assert refused == {"UNAVAILABLE: the GPU had an error; use another replica"}
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == STATUS.NOT_SERVING


@pytest.mark.parametrize(
    ("fault", "told", "end"),
    [
        ("stuck_device=1", "UNAVAILABLE: the device has not answered for 1 s", "the device has not answered for 2 s"),
        (
            "device_error=1",
            "INTERNAL: the device failed: RuntimeError: failpoint",
            "the device is lost: RuntimeError: failpoint",
        ),
    ],
)
async def test_a_lost_device_ends_the_process_with_1_after_everyone_was_answered(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, fault: str, told: str, end: str
) -> None:
    monkeypatch.setenv(VARIABLE, fault)
    options = ["--backend", "torch", "--threads", "1", "--device-timeout", str(TIMEOUT)]
    async with LocalCluster(small_model, ["0-15"], options) as cluster:
        process, address = cluster.servers[0].process, cluster.addresses[0]
        async with grpc.aio.insecure_channel(address) as channel:
            shard = await GrpcTransport(address).get_shard(10.0)
            refused = await outcomes(execute_method(channel), shard, 5)
        assert any(told in answer for answer in refused)
        assert {
            answer for answer in refused if not answer.startswith(("UNAVAILABLE: ", "INTERNAL: the device failed"))
        } == set()
        assert await asyncio.wait_for(process.wait(), 20) == 1
        assert end in cluster.servers[0].log.read_text()


async def test_an_error_of_one_batch_alone_costs_that_batch_and_nothing_else(small_model: Path) -> None:
    async with (
        running_server(small_model, EXPERTS, device_timeout=TIMEOUT) as server,
        open_channel(server) as channel,
    ):
        execute = execute_method(channel)

        def fail(*_: object) -> Underway:
            raise RuntimeError("out of memory")

        server.device.submit, submit = fail, server.device.submit
        refused = await outcomes(execute, server, 1)
        assert refused == {"INTERNAL: the device failed: RuntimeError: out of memory"}
        server.device.submit = submit
        await asyncio.sleep(2 * TIMEOUT)
        assert len((await execute(request_for(server, batch()))).partials) == 3 * 256 * 4


async def test_what_a_condemned_device_has_is_given_up_unless_it_answers() -> None:
    node = Node({number: TorchBackend() for number in range(3)}, most=3)
    engine: Any = SimpleNamespace(await_turn=lambda: None)
    lost: list[tuple[Device, str, bool]] = []

    def lose(device: Device, reason: str, hangs: bool) -> None:
        lost.append((device, reason, hangs))
        node.lose(device, reason)

    watchdog = Watchdog(node, engine, TIMEOUT, lost.append, lost.append, lose)  # type: ignore[arg-type]
    _, answering, silent = node.devices
    answering.owner.start()
    for device in (answering, silent):
        watchdog.condemn_device(device, "the GPU had an error")
    await until(lambda: silent.hangs)
    assert lost == [(answering, "the GPU had an error", False), (silent, "the GPU had an error", False)]
    assert not answering.hangs
    answering.owner.stop()


async def test_the_last_device_is_not_left_to_others_when_one_is_condemned_during_a_look() -> None:
    node = Node({number: TorchBackend() for number in range(2)}, most=2)
    engine: Any = SimpleNamespace(await_turn=lambda: None)
    told: list[str | bool] = []
    lost: list[Device] = []

    def lose(device: Device, reason: str, hangs: bool) -> None:
        lost.append(device)
        node.lose(device, reason)

    watchdog = Watchdog(node, engine, 0.2, told.append, told.append, lose)
    answering, silent = node.devices
    answering.owner.start()
    looking = asyncio.create_task(watchdog._look())
    await asyncio.sleep(0)
    watchdog.condemn_device(answering, "the GPU had an error")
    with pytest.raises(DeviceLost, match=r"the device has not answered for 0\.4 s"):
        await looking
    assert lost == [answering]
    assert node.sound == (silent,)
    assert told[:2] == ["the device has not answered for 0.2 s; use another replica", False]
    answering.owner.stop()
