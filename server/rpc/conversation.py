"""One stream: who calls, and which of their requests are being answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError
from expertd.server.rpc.executor import EngineExecutor
from expertd.server.rpc.incoming import Call, Incoming


class Conversation:
    """What the requests of one caller's stream have in common. Lives on the event loop."""

    def __init__(
        self, caller: str, identity: str, executor: EngineExecutor, respond: Callable[[bytes | None, int], object]
    ) -> None:
        """`respond` is called once for every message: with the response, if there is to be one, and its length."""
        self._caller = caller
        self._identity = identity
        self._executor = executor
        self._respond = respond
        self._by_id: dict[int, Call] = {}
        self._in_flight: set[Call] = set()
        self._changed = asyncio.Event()

    def take(self, message: bytes) -> None:
        """Begin to answer one message; what is wrong with a request is in its response."""
        call = self._executor.submit(Incoming(message, self._caller, identity=self._identity))
        if call.cancels is not None:
            call.answer.exception()  # Of a request: this is none.
            self.cancel(call.cancels)
            self._respond(None, len(message))
            return
        self._by_id[call.request_id] = call
        self._in_flight.add(call)
        call.answer.add_done_callback(partial(self._answered, call, len(message)))

    def cancel(self, request_id: int) -> None:
        """Stop answering a request; without effect when it is not in flight, or cancelled already."""
        call = self._by_id.pop(request_id, None)
        if call is not None:
            call.cancel()

    def leave(self) -> None:
        """The caller is gone: nothing need be answered."""
        for call in self._in_flight:
            call.cancel()

    async def idle(self) -> None:
        """Wait until every message has its response."""
        while self._in_flight:
            await self._changed.wait()
            self._changed.clear()

    def _answered(self, call: Call, num_bytes: int, answer: asyncio.Future[bytes]) -> None:
        self._in_flight.discard(call)
        self._changed.set()
        if self._by_id.get(call.request_id) is call:
            del self._by_id[call.request_id]
        self._respond(_response_of(call), num_bytes)


def _response_of(call: Call) -> bytes:
    """The response to a call that is answered, what is wrong with the request in it."""
    error = call.answer.exception()
    if error is None:
        return call.answer.result()
    if isinstance(error, ExpertdError):
        return codec.encode_error(call.request_id, error)
    raise error
