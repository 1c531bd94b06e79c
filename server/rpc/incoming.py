"""A request as it comes in, and its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message of a caller, not yet read."""

    message: bytes
    """An ExecuteRequest."""
    caller: str
    """The connection, for people."""
    time_remaining: float | None = None
    """Seconds until gRPC's deadline, if the call has one."""
    traceparent: str = ""
    """The caller's span, where the message names none."""
    identity: str = ""
    """Who has the connection, as callers share what the server has."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One message that was handed in, and what comes of it."""

    request_id: int
    cancels: int | None
    """The request that it cancels; nothing else of it counts then."""
    answer: asyncio.Future[bytes]
    """The response, or an `ExpertdError`."""
    cancel: Callable[[], object]
    """Have it answered with `Cancelled`, soon or once the device is done with it."""
