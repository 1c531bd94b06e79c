"""Whether the device still answers: what callers and supervisors are told when it does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from expertd._native import Engine
from expertd.server.scheduling.node import Device, Node

log = logging.getLogger(__name__)
LOOKS_PER_TIMEOUT = 4


class DeviceLost(Exception):
    """The device failed for good, or does not answer; only a new process can use it again."""


class Watchdog:
    """Asks the device for a sign of life, from time to time and at once after an error.

    A device without one for `timeout` seconds: everyone who waits is answered with `Unavailable`, new requests are
    refused, health is NOT_SERVING; when it answers after all, the server serves again. One that answers with an error,
    or not for as long again, is lost. Of several devices, those without a sign, or with an error, are lost at once, and
    the others serve on.
    """

    def __init__(
        self,
        node: Node,
        engine: Engine,
        timeout: float,
        abandon: Callable[[str], None],
        set_serving: Callable[[bool], object],
        lose: Callable[[Device, str, bool], None],
    ) -> None:
        """`abandon` answers everyone who waits with `Unavailable`, for the given reason; `lose` has the others serve on
        without a device, for a reason, and is told whether it hangs."""
        self._node = node
        self._lose = lose
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

    def condemn_device(self, device: Device, reason: str) -> None:
        """Use a device no more, or, where there is no other one, the server. What it has may come to its end yet, for
        `timeout` seconds."""
        if device.lost is not None:
            return
        if self._node.sound == (device,):
            self.condemn(reason)
        else:
            self._lose(device, reason, False)
            sign = device.owner.pass_through(partial(self._sign, device))
            sign.add_done_callback(asyncio.Future.exception)
            asyncio.get_running_loop().call_later(self._timeout, self._judge, device, sign)

    def _judge(self, device: Device, sign: asyncio.Future[None]) -> None:
        """Give up what a lost device has, unless it has come to its end."""
        if not sign.done():
            log.error("device %d, which is lost, has not answered for %g s either", device.number, self._timeout)
            self._node.forsake(device, hangs=True)

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
        signs = {device: device.owner.pass_through(partial(self._sign, device)) for device in self._node.sound}
        await asyncio.wait(signs.values(), timeout=self._timeout)
        # Some may have been condemned meanwhile.
        sound = {device: signs[device] for device in self._node.sound}
        troubled = {device: sign for device, sign in sound.items() if not sign.done() or sign.exception()}
        for sign in signs.values():
            sign.add_done_callback(asyncio.Future.exception)
        if len(troubled) == len(sound):
            await self._look_at_all(next(iter((troubled or signs).values())))
            return
        for device, sign in troubled.items():
            error = sign.exception() if sign.done() else None
            silent = f"it has not answered for {self._timeout:g} s"
            self._lose(device, silent if error is None else f"{type(error).__name__}: {error}", error is None)

    async def _look_at_all(self, sign: asyncio.Future[None]) -> None:
        """No device is well, of which this is one's sign."""
        try:
            if sign.done():
                sign.result()
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

    def _sign(self, device: Device) -> None:
        self._engine.await_turn()
        self._node.check_sign(device)

    async def _answers(self, sign: asyncio.Future[None]) -> bool:
        """Whether `sign` arrives in time; raises what the device raised."""
        done, _ = await asyncio.wait((sign,), timeout=self._timeout)
        if done:
            sign.result()
        return bool(done)
