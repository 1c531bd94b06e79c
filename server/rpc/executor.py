"""What answers `Execute` on this server: the engine, as one event loop sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from expertd._native import Engine, Inbox, Refusal
from expertd.proto.base.errors import ExpertdError, Unavailable, error_from_status
from expertd.proto.codec import ShardInfo, UpdateProgress
from expertd.server.rpc.incoming import Call, Incoming


class EngineExecutor:
    """Hands messages to the engine and its answers to those who wait. Lives on the event loop."""

    def __init__(self, engine: Engine, info: ShardInfo) -> None:
        """`info` is what callers are told of the shard."""
        self.engine = engine
        self._info = info
        self.update: Callable[[], UpdateProgress | None] = lambda: None
        """How far a change of what is owned is."""
        self._inbox = Inbox()
        self._waiting: set[asyncio.Future[bytes]] = set()

    @property
    def info(self) -> ShardInfo:
        return replace(self._info, placement_epoch=self.engine.placement.epoch, update=self.update())

    @info.setter
    def info(self, info: ShardInfo) -> None:
        self._info = info

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._inbox.fileno(), self._drain)

    def stop(self) -> None:
        """Look for answers no more: who still waits is told so."""
        asyncio.get_running_loop().remove_reader(self._inbox.fileno())
        self._reject("the server has stopped; use another replica")

    def check_open(self) -> None:
        """Raise `Unavailable` to new callers of a server that starts, drains or has lost its device."""
        reason = self.engine.closed_because
        if reason is not None:
            raise Unavailable(reason)

    def submit(self, incoming: Incoming) -> Call:
        """Hand in a message. Never raises: what is wrong with it is its answer."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        submitted = self._inbox.submit(
            self.engine,
            incoming.message,
            incoming.caller,
            answer,
            incoming.time_remaining,
            incoming.traceparent,
            identity=incoming.identity,
        )
        cancel = partial(self._cancel, submitted.ticket or 0, answer)
        refusal = submitted.refusal
        if refusal is not None:
            answer.set_exception(error_of(refusal))
        elif submitted.ticket is not None:
            self._waiting.add(answer)
        return Call(submitted.request_id, submitted.cancels, answer, cancel)

    def _cancel(self, ticket: int, answer: asyncio.Future[bytes]) -> None:
        # Whoever cancels may not wait for the error: then it is nobody's, and asyncio is not to complain of it.
        answer.add_done_callback(asyncio.Future.exception)
        self._inbox.cancel(self.engine, ticket)

    def abandon(self, reason: str) -> None:
        """Answer everyone who waits with `Unavailable`, even while the engine hangs."""
        self.engine.abandon(reason)
        self._reject(reason)

    def _reject(self, reason: str) -> None:
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(Unavailable(reason))
        self._waiting.clear()

    def _drain(self) -> None:
        for answered in self._inbox.drain():
            answer: asyncio.Future[bytes] = answered.context
            self._waiting.discard(answer)
            if answer.done():
                continue
            refusal, response = answered.refusal, answered.response
            if response is not None:
                answer.set_result(response)
            elif refusal is not None:
                answer.set_exception(error_of(refusal))


def error_of(refusal: Refusal) -> ExpertdError:
    """What the engine refuses, as whoever waits for it gets it."""
    return error_from_status(refusal.code, refusal.text, refusal.retry_after)
