"""How calls reach a server."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

import torch

from expertd.client.transport.segment import Segment
from expertd.proto.base.errors import Unavailable
from expertd.proto.codec import ExecuteCall, ExecuteResult, ShardInfo


class Silent(Unavailable):
    """The server does not answer at all: nor will it what it was asked before."""


class Transport(Protocol):
    """A connection to one server."""

    @property
    def address(self) -> str:
        """The server, for people to read."""

    @property
    def chunk_bytes(self) -> int:
        """What neither a call nor its answer should exceed now."""

    @property
    def shared_devices(self) -> frozenset[torch.device]:
        """Devices whose tensors reach the server in shared memory now; a GPU is none before the first call from it."""

    heard: float
    """On the monotonic clock: when the server answered last, whatever it was asked."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Host memory that is shared with the server now, which calls can be written to straight away. Any thread."""

    @property
    def checked(self) -> bool:
        """Whether requests have checksums now, and with them sums in shared memory."""

    async def get_shard(self, timeout: float) -> ShardInfo:
        """What the server owns; waits up to `timeout` seconds for it to be reachable and ready."""

    async def execute(self, call: ExecuteCall) -> ExecuteResult:
        """Compute one call. `call.request_id` must be unique among the calls in flight here.

        Raises the server's `ExpertdError`, or `DeadlineExceeded` after `call.timeout` seconds. Partials are where the
        hidden states are, and may be views of memory shared with the server, of which there is little: do not keep
        them. On a GPU, use them on the stream that was current when this was called, as the call's tensors are.
        """

    def exchange(self, request_id: int, message: bytes) -> Awaitable[bytes]:
        """The response, whatever it is, to an `ExecuteRequest` with its tensors in it, or `Unavailable`.

        On the event loop; it is sent whether it is awaited or not, and cancelled with what this returns.
        """

    async def until_not_serving(self) -> Unavailable:
        """Wait until the server says that it does not serve any more, the connection to it is lost, or it is silent."""

    async def close(self) -> None:
        """Give up the connection; calls in flight fail with `Unavailable`."""
