"""Whether the device still answers: what callers and supervisors are told when it does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from expertd.kernels.numerics.backend import Backend
from expertd.server.scheduling.batching import Scheduler
from expertd.server.scheduling.device import DeviceOwner

log = logging.getLogger(__name__)
LOOKS_PER_TIMEOUT = 4


class DeviceLost(Exception):
    """The device failed for good, or does not answer; only a new process can use it again."""


class Watchdog:
    """Asks the device for a sign of life, from time to time and at once after an error.

    A device without one for `timeout` seconds: everyone who waits is answered with `Unavailable`, new requests are
    refused, health is NOT_SERVING; when it answers after all, the server serves again. One that answers with an error,
    or not for as long again, is lost.
    """

    def __init__(
        self,
        backend: Backend,
        device: DeviceOwner,
        scheduler: Scheduler,
        timeout: float,
        set_serving: Callable[[bool], Awaitable[None]],
    ) -> None:
        self._backend = backend
        self._device = device
        self._scheduler = scheduler
        self._timeout = timeout
        self._set_serving = set_serving
        self._suspected = asyncio.Event()

    def suspect(self, error: BaseException) -> None:
        """Tell that the device raised `error`: it is asked at once. A fault of one batch alone changes nothing."""
        log.error("the device failed: %s: %s", type(error).__name__, error)
        self._suspected.set()

    async def run(self) -> None:
        """Watch until cancelled. Raises `DeviceLost`."""
        while True:
            try:
                async with asyncio.timeout(self._timeout / LOOKS_PER_TIMEOUT):
                    await self._suspected.wait()
            except TimeoutError:
                pass
            self._suspected.clear()
            await self._look()

    async def _look(self) -> None:
        # Through both threads, behind the batches that are under way.
        sign = self._device.run(lambda: None, lambda _: self._backend.synchronize())
        try:
            if await self._answers(sign):
                return
            reason = f"the device has not answered for {self._timeout:g} s"
            log.error("%s: refusing requests", reason)
            self._scheduler.abandon(f"{reason}; use another replica")
            await self._set_serving(False)
            if not await self._answers(sign):
                raise DeviceLost(f"the device has not answered for {2 * self._timeout:g} s")
        except DeviceLost:
            raise
        except Exception as error:
            self._scheduler.abandon(f"the device is lost, this server ends: {type(error).__name__}: {error}")
            await self._set_serving(False)
            raise DeviceLost(f"the device is lost: {type(error).__name__}: {error}") from error
        log.warning("the device answers again")
        self._scheduler.open()
        await self._set_serving(True)

    async def _answers(self, sign: asyncio.Future[None]) -> bool:
        """Whether `sign` arrives in time; raises what the device raised."""
        done, _ = await asyncio.wait((sign,), timeout=self._timeout)
        if done:
            sign.result()
        return bool(done)
