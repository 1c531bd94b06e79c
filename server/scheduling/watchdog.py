"""Whether the device still answers: what callers and supervisors are told when it does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from expertd._native import Engine
from expertd.kernels.numerics.backend import Backend
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
        engine: Engine,
        timeout: float,
        abandon: Callable[[str], None],
        set_serving: Callable[[bool], object],
    ) -> None:
        """`abandon` answers everyone who waits with `Unavailable`, for the given reason."""
        self._backend = backend
        self._device = device
        self._engine = engine
        self._abandon = abandon
        self._timeout = timeout
        self._set_serving = set_serving
        self._suspected = asyncio.Event()
        self.condemned: str | None = None
        """Why the server is not to serve again, whatever the device answers."""

    async def run(self) -> None:
        """Watch until cancelled. Raises `DeviceLost`."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._engine.fault_fileno(), self._suspect)
        try:
            await self._watch()
        finally:
            loop.remove_reader(self._engine.fault_fileno())

    def condemn(self, reason: str) -> None:
        """Refuse requests from now on and be unhealthy; what is under way may yet be answered."""
        self.condemned = reason
        log.error("%s: refusing requests", reason)
        self._engine.close(f"{reason}; use another replica")
        self._set_serving(False)

    def _suspect(self) -> None:
        """A batch failed: the device is asked at once. A fault of one batch alone changes nothing."""
        fault = self._engine.take_fault()
        if fault is not None:
            log.error("%s", fault)
            self._suspected.set()

    async def _watch(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._timeout / LOOKS_PER_TIMEOUT):
                    await self._suspected.wait()
            except TimeoutError:
                pass
            self._suspected.clear()
            await self._look()

    async def _look(self) -> None:
        # Through the engine and both threads, behind the batches that are under way.
        sign = self._device.pass_through(self._sign)
        try:
            if await self._answers(sign):
                return
            reason = f"the device has not answered for {self._timeout:g} s"
            log.error("%s: refusing requests", reason)
            self._abandon(f"{reason}; use another replica")
            self._set_serving(False)
            if not await self._answers(sign):
                raise DeviceLost(f"the device has not answered for {2 * self._timeout:g} s")
        except DeviceLost:
            raise
        except Exception as error:
            self._abandon(f"the device is lost, this server ends: {type(error).__name__}: {error}")
            self._set_serving(False)
            raise DeviceLost(f"the device is lost: {type(error).__name__}: {error}") from error
        log.warning("the device answers again")
        if self.condemned is not None:
            self.condemn(self.condemned)
            return
        self._engine.open()
        self._set_serving(True)

    def _sign(self) -> None:
        self._engine.await_turn()
        self._backend.synchronize()

    async def _answers(self, sign: asyncio.Future[None]) -> bool:
        """Whether `sign` arrives in time; raises what the device raised."""
        done, _ = await asyncio.wait((sign,), timeout=self._timeout)
        if done:
            sign.result()
        return bool(done)
