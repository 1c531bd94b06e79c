"""Looks after the GPU's health: metrics tell it, and with a fault that no program mends the server refuses requests."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from expertd.server.hardware.gpu_health import GpuHealth, GpuLost, Reading
from expertd.server.hardware.xid import FATAL
from expertd.server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)
LOOK_SECONDS = 5.0
"""Between two looks; Xid errors are seen at once."""


class GpuWatch:
    """Lives on the event loop; NVML is asked on threads of its own, which may hang with the driver."""

    def __init__(self, gpu: GpuHealth, metrics: Metrics, condemn: Callable[[str], None]) -> None:
        """`condemn` makes the server unhealthy for a reason."""
        self._gpu = gpu
        self._metrics = metrics
        self._condemn = condemn
        self.reading = gpu.read()
        self.look_seconds = LOOK_SECONDS
        self._export()

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
        self._metrics.gpu_xids.labels(xid).inc()
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

    def _export(self) -> None:
        """Series of what this GPU tells."""
        metrics = self._metrics
        for xid in FATAL:
            metrics.gpu_xids.labels(xid)
        metrics.gpu_temperature.set_function(
            lambda: [((), (celsius,))] if (celsius := self.reading.temperature) is not None else []
        )
        metrics.gpu_throttled.set_function(
            lambda: (((reason,), (int(holds),)) for reason, holds in self.reading.throttling.items())
        )
        metrics.gpu_ecc_errors.set_function(lambda: (((kind,), (n,)) for kind, n in self.reading.ecc_errors.items()))
        metrics.gpu_links.set_function(lambda: (((state,), (n,)) for state, n in self.reading.links.items()))
        metrics.gpu_link_errors.set_function(lambda: (((kind,), (n,)) for kind, n in self.reading.link_errors.items()))
        metrics.export(metrics.gpu_xids, metrics.gpu_temperature, metrics.gpu_throttled)
        metrics.export(metrics.gpu_ecc_errors, metrics.gpu_links, metrics.gpu_link_errors)
