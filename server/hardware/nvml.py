"""NVIDIA's management library, as far as it is used here, by the names that its bindings have."""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

CORRECTED, UNCORRECTED = 0, 1
SINCE_DRIVER_LOADED = 0
GPU_SENSOR = 0
XID_EVENT = 8
MOST_LINKS = 36
THROTTLING = {
    "power_cap": 0x4,
    "hardware_slowdown": 0x8,
    "thermal_software": 0x20,
    "thermal_hardware": 0x40,
    "power_brake": 0x80,
}
"""Reasons for slower clocks that say something of the machine; idleness and chosen clocks do not."""
LINK_ERRORS = {"replay": 0, "recovery": 1, "crc_flit": 2, "crc_data": 3}
Handle = Any


class Event(Protocol):
    """What NVML has noticed."""

    eventType: int  # noqa: N815
    eventData: int  # noqa: N815


class Nvml(Protocol):
    """The bindings' module; its functions raise `NVMLError`."""

    @property
    def NVMLError(self) -> type[Exception]:  # noqa: N802
        """What all of its errors are."""

    @property
    def NVMLError_Timeout(self) -> type[Exception]:  # noqa: N802
        """Nothing was noticed in time."""

    @property
    def NVMLError_GpuIsLost(self) -> type[Exception]:  # noqa: N802
        """The GPU has fallen off the bus, or cannot be reached."""

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlShutdown(self) -> None: ...  # noqa: N802
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Handle: ...  # noqa: N802
    def nvmlDeviceGetTemperature(self, device: Handle, sensor: int) -> int: ...  # noqa: N802
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: Handle) -> int: ...  # noqa: N802
    def nvmlDeviceGetTotalEccErrors(self, device: Handle, kind: int, counter: int) -> int: ...  # noqa: N802
    def nvmlDeviceGetNvLinkState(self, device: Handle, link: int) -> int: ...  # noqa: N802
    def nvmlDeviceGetNvLinkErrorCounter(self, device: Handle, link: int, counter: int) -> int: ...  # noqa: N802
    def nvmlEventSetCreate(self) -> Handle: ...  # noqa: N802
    def nvmlDeviceRegisterEvents(self, device: Handle, types: int, events: Handle) -> object: ...  # noqa: N802
    def nvmlEventSetWait_v2(self, events: Handle, milliseconds: int) -> Event: ...  # noqa: N802
    def nvmlEventSetFree(self, events: Handle) -> object: ...  # noqa: N802


def load_nvml() -> Nvml | None:
    """The bindings; None where they are not installed."""
    try:
        return cast(Nvml, importlib.import_module("pynvml"))
    except ImportError:
        return None
