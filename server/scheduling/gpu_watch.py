"""Looks after the GPU's health: metrics tell it, and with a fault that no program mends the server refuses requests."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

from expertd.server.hardware.gpu_health import GpuHealth, GpuLost, Reading
from expertd.server.hardware.xid import FATAL
from expertd.server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)
LOOK_SECONDS = 5.0
"""Between two looks; Xid errors are seen at once."""


class GpuWatch:
    """Of one device. Lives on the event loop; NVML is asked on threads of its own, which may hang with the driver."""

    def __init__(self, device: int, gpu: GpuHealth, metrics: Metrics, condemn: Callable[[str], None]) -> None:
        """`condemn` has the device not used any more, for a reason."""
        self._device = device
        self._gpu = gpu
        self._metrics = metrics
        self._condemn = condemn
        self.reading = gpu.read()
        self.look_seconds = LOOK_SECONDS
        for xid in FATAL:
            metrics.gpu_xids.labels(device, xid)

    async def run(self) -> None:
        """Watch until the GPU is lost."""
        while True:
            try:
                xids, self.reading = await self._look()
            except GpuLost as error:
                return self._condemn(f"the GPU is lost: NVML says {error}; reset it or restart the machine")
            for xid in xids:
                self._tell(xid)

    def _tell(self, xid: int) -> None:
        self._metrics.gpu_xids.labels(self._device, xid).inc()
        meaning = FATAL.get(xid)
        log.error("the GPU had Xid error %d (%s)", xid, meaning or "see NVIDIA's catalogue of Xid errors")
        if meaning is not None:
            self._condemn(f"the GPU had Xid error {xid}: {meaning}; reset or replace it")

    async def _look(self) -> tuple[list[int], Reading]:
        looked: Future[tuple[list[int], Reading]] = Future()
        # Whoever stops to wait for it leaves it to its thread.
        looked.set_running_or_notify_cancel()

        def look() -> None:
            try:
                looked.set_result((self._gpu.xids(self.look_seconds), self._gpu.read()))
            except Exception as error:
                looked.set_exception(error)

        # Not one of the event loop's, for whose end a process waits.
        threading.Thread(target=look, name="gpu-health", daemon=True).start()
        return await asyncio.wrap_future(looked)


def export(metrics: Metrics, watches: Mapping[int, GpuWatch]) -> None:
    """Series of what GPUs tell, by their devices' numbers."""

    def each(kind: Callable[[Reading], Mapping[str, float]]) -> Iterator[tuple[tuple[int, str], tuple[float]]]:
        return (((device, name), (n,)) for device, its in watches.items() for name, n in kind(its.reading).items())

    metrics.gpu_temperature.set_function(
        lambda: (
            ((device,), (celsius,))
            for device, its in watches.items()
            if (celsius := its.reading.temperature) is not None
        )
    )
    metrics.gpu_throttled.set_function(lambda: each(lambda reading: reading.throttling))
    metrics.gpu_ecc_errors.set_function(lambda: each(lambda reading: reading.ecc_errors))
    metrics.gpu_links.set_function(lambda: each(lambda reading: reading.links))
    metrics.gpu_link_errors.set_function(lambda: each(lambda reading: reading.link_errors))
    metrics.export(metrics.gpu_xids, metrics.gpu_temperature, metrics.gpu_throttled)
    metrics.export(metrics.gpu_ecc_errors, metrics.gpu_links, metrics.gpu_link_errors)
