"""A request as it comes in, by whichever door, and what answers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from expertd.proto.codec import RawRequest
from expertd.proto.lane.layout import SharedSegment


@dataclass(frozen=True, slots=True)
class Incoming:
    """One request, not yet decoded."""

    request: RawRequest
    caller: str
    time_remaining: float | None = None
    """Seconds until gRPC's deadline, if the call has one."""
    segment: SharedSegment | None = None
    """Where the tensors lie that the request does not carry."""


class Executor(Protocol):
    """What answers requests: this process's device, or another process."""

    async def answer(self, incoming: Incoming) -> bytes:
        """The response. Raises `ExpertdError`."""
