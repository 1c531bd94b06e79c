"""The ways in: a door for each, all opened and drained alike."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Protocol

import grpc.aio

from expertd.server.options.config import Address, InvalidOption
from expertd.server.rpc.execution import ExecuteHandlers

UNTIL_CLOSED = 1e6
"""Seconds of grace. `close` alone cuts calls off: gRPC would use a freed server when a grace ends meanwhile."""


class Door(Protocol):
    """A way for calls to come in."""

    async def listen(self) -> None:
        """Let callers in. Raises `InvalidOption` when its place is not to be had."""

    def disconnect(self) -> None:
        """Take shared memory from all callers at once, since the device may still write to it."""

    async def drain(self, seconds: float) -> None:
        """Read no more requests, and answer those that were read, for at most `seconds`."""

    async def close(self) -> None:
        """End what is left once all doors are drained."""


class GrpcDoor:
    """A gRPC server, bound before it listens."""

    def __init__(
        self,
        address: Address,
        handlers: ExecuteHandlers,
        make: Callable[[], grpc.aio.Server],
        add_port: Callable[[grpc.aio.Server, Address], int],
    ) -> None:
        """`make` a server without an address, whose calls `handlers` answer, and `add_port` to it."""
        self.address = address
        self._handlers = handlers
        self._make = make
        self._add_port = add_port

    def bind(self) -> None:
        """Raises `InvalidOption`."""
        self._server = self._make()
        try:
            port = self._add_port(self._server, self.address)
        except (OSError, RuntimeError) as error:
            raise InvalidOption(f"--listen {self.address} cannot be bound: {error}") from None
        self.address = dataclasses.replace(self.address, port=port)

    async def listen(self) -> None:
        await self._server.start()

    def disconnect(self) -> None:
        """Over gRPC no memory is shared."""

    async def drain(self, seconds: float) -> None:
        """Say GOAWAY at once."""
        self._handlers.stop_reading()
        self._going_away = asyncio.ensure_future(self._server.stop(UNTIL_CLOSED))
        await self._handlers.idle(seconds)

    async def close(self) -> None:
        # What is left are watchers of health, who need not leave when they are told.
        await self._server.stop(None)
        await self._going_away
