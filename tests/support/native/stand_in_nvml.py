"""Answers like NVML: one GPU, and what is to be asked of it."""

import queue
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml

UUID = "GPU-0b3f"


@dataclass
class StandInNvml:
    """By default in good health; what is in `missing` this GPU or driver does not support."""

    NVMLError: type[Exception] = pynvml.NVMLError
    NVMLError_Timeout: type[Exception] = pynvml.NVMLError_Timeout
    NVMLError_GpuIsLost: type[Exception] = pynvml.NVMLError_GpuIsLost
    temperature: int = 41
    lowered: int = 0
    ecc: dict[int, int] = field(default_factory=lambda: {0: 7, 1: 0})
    links: list[int] = field(default_factory=lambda: [1] * 18)
    missing: set[str] = field(default_factory=set)
    gone: Exception | None = None
    """What everything raises since the driver has gone."""
    events: "queue.Queue[int | Exception]" = field(default_factory=queue.Queue)
    """Xid numbers, or what the wait for one raises."""
    open: int = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self._check("init")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._check("shutdown")
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self._check("device")
        if uuid != UUID:
            raise pynvml.NVMLError_NotFound
        return uuid

    def nvmlDeviceGetTemperature(self, device: str, sensor: int) -> int:  # noqa: N802
        self._check("temperature")
        return self.temperature

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: str) -> int:  # noqa: N802
        self._check("throttling")
        return self.lowered

    def nvmlDeviceGetTotalEccErrors(self, device: str, kind: int, counter: int) -> int:  # noqa: N802
        self._check("ecc")
        return self.ecc[kind]

    def nvmlDeviceGetNvLinkState(self, device: str, link: int) -> int:  # noqa: N802
        self._check("links")
        if link >= len(self.links):
            raise pynvml.NVMLError_InvalidArgument
        return self.links[link]

    def nvmlDeviceGetNvLinkErrorCounter(self, device: str, link: int, counter: int) -> int:  # noqa: N802
        self._check("link errors")
        return counter

    def nvmlEventSetCreate(self) -> str:  # noqa: N802
        self._check("event set")
        return "events"

    def nvmlDeviceRegisterEvents(self, device: str, types: int, events: str) -> None:  # noqa: N802
        self._check("events")

    def nvmlEventSetWait_v2(self, events: str, milliseconds: int) -> SimpleNamespace:  # noqa: N802
        self._check("wait")
        try:
            event = self.events.get(timeout=milliseconds / 1000) if milliseconds else self.events.get_nowait()
        except queue.Empty:
            raise pynvml.NVMLError_Timeout from None
        if isinstance(event, Exception):
            raise event
        return SimpleNamespace(eventType=pynvml.nvmlEventTypeXidCriticalError, eventData=event)

    def nvmlEventSetFree(self, events: str) -> None:  # noqa: N802
        self._check("free")

    def _check(self, what: str) -> None:
        if self.gone is not None:
            raise self.gone
        if what in self.missing:
            raise pynvml.NVMLError_NotSupported
