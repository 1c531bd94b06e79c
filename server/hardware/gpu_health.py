"""How the GPU is, by NVML: temperature, throttling, ECC, NVLink and Xid errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import ParamSpec, Self, TypeVar

from expertd.server.hardware.nvml import (
    CORRECTED,
    GPU_SENSOR,
    LINK_ERRORS,
    MOST_LINKS,
    SINCE_DRIVER_LOADED,
    THROTTLING,
    UNCORRECTED,
    XID_EVENT,
    Handle,
    Nvml,
)

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
NOW_MS = 0


class GpuLost(Exception):
    """NVML cannot reach the GPU any more."""


@dataclass(frozen=True, slots=True)
class Reading:
    """As far as this GPU and its driver tell: what they do not is None or not there."""

    temperature: int | None = None
    """Celsius."""
    throttling: Mapping[str, bool] = field(default_factory=dict)
    """Whether clocks are lower for each reason."""
    ecc_errors: Mapping[str, int] = field(default_factory=dict)
    """Corrected and uncorrected ones since the driver was loaded."""
    links: Mapping[str, int] = field(default_factory=dict)
    """NVLinks that are up and down."""
    link_errors: Mapping[str, int] = field(default_factory=dict)
    """Of all links, by kind."""

    def __str__(self) -> str:
        """For people."""
        reasons = [reason.replace("_", " ") for reason, holds in self.throttling.items() if holds]
        parts = [] if self.temperature is None else [f"{self.temperature} °C"]
        parts += [f"clocks lowered by {', '.join(reasons)}"] if reasons else []
        parts += [f"{count} {kind} ECC errors" for kind, count in self.ecc_errors.items() if count]
        parts += [f"{count} NVLinks {state}" for state, count in self.links.items() if count]
        parts += [f"{count} NVLink {kind} errors" for kind, count in self.link_errors.items() if count]
        return ", ".join(parts) or "it tells nothing"


class GpuHealth:
    """One GPU. One thread at a time."""

    def __init__(self, nvml: Nvml, device: Handle) -> None:
        self._nvml = nvml
        self._device = device
        self._events = self._listen()

    @classmethod
    def open(cls, nvml: Nvml | None, uuid: str) -> Self | None:
        """Of the GPU that `nvidia-smi -L` calls `uuid`; None, with a reason in the log, where NVML does not know it."""
        if nvml is None:
            log.info("the GPU's health is not watched: pip install nvidia-ml-py")
            return None
        try:
            nvml.nvmlInit()
            try:
                return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
            except nvml.NVMLError:
                nvml.nvmlShutdown()
                raise
        except nvml.NVMLError as error:
            log.warning("the GPU's health is not watched: NVML says %s", error)
            return None

    def close(self) -> None:
        if self._events is not None:
            self._ask(self._nvml.nvmlEventSetFree, self._events)
        self._ask(self._nvml.nvmlShutdown)

    def xids(self, seconds: float) -> list[int]:
        """Wait so long for an Xid error: those that came. Raises `GpuLost`."""
        found: list[int] = []
        wait_ms = round(seconds * 1000)
        if self._events is None:
            time.sleep(seconds)
            return found
        try:
            while True:
                event = self._nvml.nvmlEventSetWait_v2(self._events, wait_ms)
                if event.eventType == XID_EVENT:
                    found.append(int(event.eventData))
                wait_ms = NOW_MS
        except self._nvml.NVMLError_Timeout:
            return found
        except self._nvml.NVMLError_GpuIsLost as error:
            raise GpuLost(str(error)) from None
        except self._nvml.NVMLError:
            # The driver is gone or is being replaced: it may come back, and answers at once meanwhile.
            time.sleep(seconds)
            return found

    def read(self) -> Reading:
        nvml, device = self._nvml, self._device
        lowered = self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, device)
        states = list(self._links())
        return Reading(
            self._ask(nvml.nvmlDeviceGetTemperature, device, GPU_SENSOR),
            {} if lowered is None else {reason: bool(lowered & bit) for reason, bit in THROTTLING.items()},
            _known({"corrected": self._ecc_errors(CORRECTED), "uncorrected": self._ecc_errors(UNCORRECTED)}),
            {"up": states.count(1), "down": states.count(0)} if states else {},
            _known({kind: self._link_errors(len(states), counter) for kind, counter in LINK_ERRORS.items()}),
        )

    def _listen(self) -> Handle | None:
        """Not every GPU has events: a part of one (MIG) has none."""
        events = self._ask(self._nvml.nvmlEventSetCreate)
        if events is None:
            return None
        try:
            self._nvml.nvmlDeviceRegisterEvents(self._device, XID_EVENT, events)
        except self._nvml.NVMLError as error:
            log.warning("Xid errors of the GPU are not watched: NVML says %s", error)
            self._ask(self._nvml.nvmlEventSetFree, events)
            return None
        return events

    def _links(self) -> Iterator[int]:
        """Whether each is up; a GPU has those below the first that NVML does not know."""
        states = (self._ask(self._nvml.nvmlDeviceGetNvLinkState, self._device, link) for link in range(MOST_LINKS))
        return (state for state in takewhile(lambda state: state is not None, states) if state is not None)

    def _ecc_errors(self, kind: int) -> int | None:
        return self._ask(self._nvml.nvmlDeviceGetTotalEccErrors, self._device, kind, SINCE_DRIVER_LOADED)

    def _link_errors(self, links: int, counter: int) -> int | None:
        counts = [
            self._ask(self._nvml.nvmlDeviceGetNvLinkErrorCounter, self._device, link, counter) for link in range(links)
        ]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None

    def _ask(self, question: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T | None:
        """None where NVML has no answer: not every GPU and driver tells everything."""
        try:
            return question(*arguments, **options)
        except self._nvml.NVMLError:
            return None


def _known(values: Mapping[str, int | None]) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}
