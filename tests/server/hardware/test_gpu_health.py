"""What NVML tells of a GPU, whatever it does not tell; and a server that hears of a fault."""

import asyncio
import logging
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pynvml
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd.server.app import Server
from expertd.server.doctor.gpu import check_health
from expertd.server.hardware import nvml as constants
from expertd.server.hardware.gpu_health import GpuHealth, GpuLost, Reading
from expertd.server.hardware.nvml import load_nvml
from expertd.server.hardware.xid import FATAL
from expertd.server.scheduling.node import Device
from tests.support.native.stand_in_nvml import UUID, StandInNvml
from tests.support.serving import execute_method, open_channel, random_batch, request_for, running_server, until

ALL = range(16)


def opened(nvml: StandInNvml) -> GpuHealth:
    health = GpuHealth.open(nvml, UUID)
    assert health is not None
    return health


def test_a_gpu_in_good_health() -> None:
    reading = opened(StandInNvml()).read()
    assert reading.temperature == 41
    assert reading.throttling == dict.fromkeys(constants.THROTTLING, False)
    assert reading.ecc_errors == {"corrected": 7, "uncorrected": 0}
    assert reading.links == {"up": 18, "down": 0}
    assert reading.link_errors == {kind: 18 * counter for kind, counter in constants.LINK_ERRORS.items()}


def test_throttling_says_why_and_idleness_is_none() -> None:
    bits = pynvml.nvmlClocksEventReasonHwThermalSlowdown | pynvml.nvmlClocksEventReasonGpuIdle
    throttling = opened(StandInNvml(lowered=bits)).read().throttling
    assert [reason for reason, holds in throttling.items() if holds] == ["thermal_hardware"]


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        ("temperature", {"temperature": None}),
        ("throttling", {"throttling": {}}),
        ("ecc", {"ecc_errors": {}}),
        ("links", {"links": {}, "link_errors": {}}),
        ("link errors", {"link_errors": {}}),
    ],
)
def test_what_is_not_supported_is_left_out_alone(missing: str, part: dict[str, object]) -> None:
    whole, found = opened(StandInNvml()).read(), opened(StandInNvml(missing={missing})).read()
    assert {name: getattr(found, name) for name in part} == part
    rest = set(Reading.__slots__) - part.keys()
    assert all(getattr(found, name) == getattr(whole, name) for name in rest)


def test_xid_errors_come_at_once_and_together() -> None:
    nvml = StandInNvml()
    health = opened(nvml)
    assert health.xids(0.01) == []
    for xid in (13, 79):
        nvml.events.put(xid)
    started = time.monotonic()
    assert health.xids(60) == [13, 79]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("missing", ["events", "event set"])
def test_a_gpu_without_events_is_read_all_the_same(missing: str) -> None:
    health = opened(StandInNvml(missing={missing}))
    started = time.monotonic()
    assert health.xids(0.05) == []
    assert time.monotonic() - started >= 0.05
    assert health.read().temperature == 41


def test_a_driver_that_is_gone_tells_nothing_and_is_not_asked_without_end() -> None:
    nvml = StandInNvml()
    health = opened(nvml)
    nvml.gone = pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
    started = time.monotonic()
    assert health.xids(0.05) == []
    assert time.monotonic() - started >= 0.05
    assert (health.read(), str(health.read())) == (Reading(), "it tells nothing")
    health.close()


def test_a_lost_gpu_is_an_error() -> None:
    nvml = StandInNvml()
    health = opened(nvml)
    nvml.gone = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
    with pytest.raises(GpuLost):
        health.xids(0.05)


def test_a_gpu_that_nvml_does_not_know_is_not_watched(caplog: pytest.LogCaptureFixture) -> None:
    assert GpuHealth.open(StandInNvml(), "GPU-other") is None
    assert GpuHealth.open(StandInNvml(missing={"init"}), UUID) is None
    assert caplog.text.count("is not watched") == 2


def test_the_numbers_are_the_librarys() -> None:
    nvml = load_nvml()
    assert nvml is not None
    assert (constants.CORRECTED, constants.UNCORRECTED) == (
        pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
    )
    assert constants.SINCE_DRIVER_LOADED == pynvml.NVML_VOLATILE_ECC
    assert (
        pynvml.NVML_TEMPERATURE_GPU,
        pynvml.nvmlEventTypeXidCriticalError,
    ) == (constants.GPU_SENSOR, constants.XID_EVENT)
    assert constants.MOST_LINKS == pynvml.NVML_NVLINK_MAX_LINKS
    names = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    bits = [getattr(pynvml, f"nvmlClocksEventReason{name}") for name in names]
    assert list(constants.THROTTLING.values()) == bits
    errors = ("REPLAY", "RECOVERY", "CRC_FLIT", "CRC_DATA")
    counters = [getattr(pynvml, f"NVML_NVLINK_ERROR_DL_{name}") for name in errors]
    assert list(constants.LINK_ERRORS.values()) == counters
    assert all(hasattr(nvml, name) for name in vars(constants.Nvml) if name.lower().startswith("nvml"))


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="has a driver")
def test_the_real_library_without_a_driver_watches_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert GpuHealth.open(load_nvml(), UUID) is None
    assert "is not watched: NVML says" in caplog.text


def get(server: Server, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{server.metrics_address}{path}", timeout=10) as answer:
            return answer.status, str(answer.read(), "utf-8")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, str(error.read(), "utf-8")


def gpu_series(server: Server) -> list[str]:
    return [metric.name for metric in server.metrics.registry.collect() if metric.name.startswith("expertd_gpu")]


async def test_a_server_without_a_gpu_says_nothing_of_one(small_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running_server(small_model, ALL) as server:
        assert gpu_series(server) == []
        assert [device["health"] for device in server.pages.status.snapshot()["devices"]] == [None]
    assert "GPU" not in caplog.text


async def test_a_server_tells_its_gpus_health(small_model: Path) -> None:
    nvml = StandInNvml(lowered=pynvml.nvmlClocksEventReasonSwPowerCap)
    nvml.links[3] = 0

    def open_gpu(_: Device) -> GpuHealth:
        return opened(nvml)

    async with running_server(small_model, ALL, open_gpu=open_gpu) as server:

        def value(name: str, **labels: str) -> float | None:
            return server.metrics.registry.get_sample_value(name, {"device": "0", **labels})

        assert value("expertd_gpu_temperature_celsius") == 41
        assert value("expertd_gpu_throttled", reason="power_cap") == 1
        assert value("expertd_gpu_throttled", reason="power_brake") == 0
        assert value("expertd_gpu_ecc_errors_total", kind="corrected") == 7
        assert [value("expertd_gpu_nvlinks", state=state) for state in ("up", "down")] == [17, 1]
        assert value("expertd_gpu_nvlink_errors_total", kind="recovery") == 18
        assert value("expertd_gpu_xid_errors_total", xid="79") == 0
        told = server.pages.status.snapshot()["devices"][0]["health"]
        assert told.startswith("41 °C, clocks lowered by power cap, 7 corrected ECC errors, 17 NVLinks up, 1 NVLinks")
        # A program's own fault: told, no more.
        nvml.temperature = 55
        nvml.events.put(31)
        await until(lambda: value("expertd_gpu_xid_errors_total", xid="31") == 1)
        await until(lambda: value("expertd_gpu_temperature_celsius") == 55)
        assert (await asyncio.to_thread(get, server, "/readyz"))[0] == 200


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (79, f"the GPU had Xid error 79: {FATAL[79]}; reset or replace it"),
        (pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST), "the GPU is lost: NVML says GPU is lost"),
    ],
)
async def test_a_fatal_fault_makes_a_server_unhealthy_for_good(
    small_model: Path, event: int | Exception, reason: str
) -> None:
    nvml = StandInNvml()

    def open_gpu(_: Device) -> GpuHealth:
        return opened(nvml)

    async with (
        running_server(small_model, ALL, open_gpu=open_gpu) as server,
        open_channel(server) as channel,
    ):
        execute = execute_method(channel)
        request = request_for(server, random_batch(4, 256, 16, 4))
        await execute(request)
        nvml.events.put(event)
        await until(lambda: server.engine.closed_because is not None)
        code, text = await asyncio.to_thread(get, server, "/readyz")
        assert code == 503
        assert text.startswith(reason)
        assert (await asyncio.to_thread(get, server, "/healthz"))[0] == 200
        stub: Any = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await execute(request)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert reason in (refused.value.details() or "")


@pytest.mark.parametrize(
    ("nvml", "level", "text"),
    [
        (StandInNvml(), "ok", "41 °C, 7 corrected ECC errors, 18 NVLinks up"),
        (StandInNvml(ecc={0: 0, 1: 2}), "warn", "2 uncorrected ECC errors"),
        (StandInNvml(lowered=0x40), "warn", "it computes slowly; look at its cooling and power"),
        (StandInNvml(lowered=0x4), "ok", "clocks lowered by power cap"),
        (StandInNvml(missing={"device"}), "warn", "NVML does not know this GPU"),
        (None, "warn", "pip install 'expertd[server]'"),
    ],
)
def test_the_doctor_looks_at_the_gpu(nvml: StandInNvml | None, level: str, text: str) -> None:
    (finding,) = check_health(UUID, nvml)
    assert (finding.level, finding.check) == (level, "gpu health")
    assert text in finding.text
    assert nvml is None or nvml.open == 0
