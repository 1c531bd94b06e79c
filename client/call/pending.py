"""A call that a thread has begun and will collect."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from threading import Lock

from expertd.client.base.loop_thread import LoopThread
from expertd.client.call.result import MoeResult, ended
from expertd.client.call.routed import RoutedCall
from expertd.client.call.straight import GIVEN_UP, StraightCall
from expertd.client.telemetry.meter import CallMeter
from expertd.proto.base.errors import Cancelled


class PendingCall:
    """What the caller's thread does meanwhile overlaps with the servers' work; `result` collects it.

    One that is let go without its result is cancelled.
    """

    def __init__(
        self, call: RoutedCall, loop: LoopThread, meter: CallMeter, hand_over: Callable[[MoeResult], None] | None
    ) -> None:
        """`loop` is the coordinator's; `hand_over` is called with the result, on the thread that collects it."""
        self._call = call
        self._hand_over = hand_over
        self._loop = loop
        self._meter = meter
        self._collecting = Lock()
        self._result: MoeResult | BaseException | None = None
        self._straight: StraightCall | None = None
        self._future: Future[MoeResult] | None = None
        self._straight = call.begin(loop.soon)
        if self._straight is None:
            self._future = loop.start(call.finish())

    def result(self) -> MoeResult:
        """Wait for the result on this thread. Raises what `Coordinator.execute` does; the same one when asked again."""
        with self._collecting:
            try:
                if self._result is None:
                    self._result = self._counted()
            except Cancelled as error:
                # By its caller, where that is known already.
                self._result = self._result or error
            except BaseException as error:
                self._result = error
            finally:
                # Ctrl-C while waiting: the call must not go on without anybody who wants it.
                self._close()
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result

    def cancel(self) -> None:
        """Give it up, unless it has its result: servers that have not begun with it will not. Any thread."""
        if self._result is None:
            self._result = Cancelled("the call was cancelled by its caller")
        if self._collecting.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._collecting.release()
            return
        # Whoever collects it closes it, too.
        if self._straight is not None:
            self._straight.give_up()
        if self._future is not None:
            self._future.cancel()

    def __del__(self) -> None:
        """By the event loop: the thread that Python has this done on may hold any lock that cancelling takes."""
        if self._result is None:
            # Once the loop is closed, so is everything that the call has.
            with contextlib.suppress(RuntimeError):
                self._loop.soon(self.cancel)

    def _close(self) -> None:
        if self._straight is not None:
            self._straight.close()
        if self._future is not None:
            self._future.cancel()

    def _counted(self) -> MoeResult:
        with self._meter.counting():
            result = self._collect()
        ended(self._meter, result)()
        if self._hand_over is not None:
            self._hand_over(result)
        return result

    def _collect(self) -> MoeResult:
        if self._straight is not None:
            result = self._call.result_of(self._straight)
            if result is not None:
                return result
            self._future = self._loop.start(self._call.finish(self._straight.outcomes()))
            self._straight.close()
        assert self._future is not None
        if self._result is not None:
            # Cancelled before there was this to cancel.
            self._future.cancel()
        try:
            return self._future.result()
        except CancelledError:
            raise GIVEN_UP.again() from None
