"""A call that a thread has begun and will collect."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from expertd.client.base.loop_thread import LoopThread
from expertd.client.call.result import MoeResult
from expertd.client.call.routed import RoutedCall
from expertd.client.call.straight import StraightCall
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
        self._result: MoeResult | BaseException | None = None
        self._straight: StraightCall | None = None
        self._future: Future[MoeResult] | None = None
        self._straight = call.begin(looped=False)
        if self._straight is None:
            self._future = loop.start(call.finish())
        else:
            self._straight.send(loop.soon)

    def result(self) -> MoeResult:
        """Wait for the result on this thread. Raises what `Coordinator.execute` does; the same one when asked again."""
        if self._result is None:
            try:
                with self._meter.counting():
                    self._result = self._collect()
                self._meter.answered(self._result.output, self._result.degraded_tokens, self._result.waited)
                if self._hand_over is not None:
                    self._hand_over(self._result)
            except BaseException as error:
                self._result = error
                raise
            finally:
                # Ctrl-C while waiting: the call must not go on without anybody who wants it.
                self.cancel()
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result

    def cancel(self) -> None:
        """Give it up, unless it has its result: servers that have not begun with it will not."""
        if self._result is None:
            self._result = Cancelled("the call was cancelled by its caller")
        if self._straight is not None:
            self._straight.close()
        if self._future is not None:
            self._future.cancel()

    def __del__(self) -> None:
        self.cancel()

    def _collect(self) -> MoeResult:
        if self._straight is not None:
            result = self._call.result_of(self._straight)
            if result is not None:
                return result
            self._future = self._loop.start(self._call.finish(self._straight.outcomes()))
            self._straight.close()
        assert self._future is not None
        return self._future.result()
