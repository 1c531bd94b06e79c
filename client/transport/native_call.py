"""Calls whose tensors native code writes to shared memory by itself, and whose sums it adds out of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from expertd import _native
from expertd.client.transport.segment import Segment
from expertd.proto.codec import ExecuteCall
from expertd.proto.lane.layout import tokens_within

LONG_ELEMENTS = 1 << 20
"""Of hidden states that an event loop has other threads write: half a millisecond."""
KEPT_BYTES = 256 << 10
"""Of sums that stay in the shared memory for as long as their caller has them; fewer are copied out of it."""
MOST_TOKENS = 1 << 31
"""Of one message: servers have a bound of their own."""


class Terms(NamedTuple):
    """What requests say beside their tensors."""

    layer: int
    hidden_dtype: torch.dtype
    """As it travels."""
    reply_dtype: torch.dtype
    request_id: int
    timeout: float | None
    """Seconds."""
    traceparents: Sequence[str] = ()
    """For each owner, or none."""


def stays(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether sums of `hidden` [T, H] in this dtype are worth it."""
    return hidden.numel() * dtype.itemsize >= KEPT_BYTES


def kept(call: _native.StraightCall, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The sums of a finished call in place, in the memory where they came, which is free when nobody has them."""
    return torch.frombuffer(call.keep(), dtype=dtype).view(shape)


class Watch:
    """Has the event loop, that of `segments`, look at a looped call whenever a lane has news of it, until it ends."""

    def __init__(self, call: _native.StraightCall, segments: Iterable[Segment]) -> None:
        self._call = call
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        of = {segment.lane: segment for segment in segments}
        self._slots = [(of[lane], slot) for lane, slot in call.slots()]
        for segment, slot in self._slots:
            segment.watch(slot, self.look)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def look(self) -> None:
        if self._call.collect() and not self._done.done():
            self._done.set_result(None)

    async def wait(self, timeout: float | None) -> None:
        """Until the call is done, at most so many seconds."""
        self.look()
        try:
            async with asyncio.timeout(timeout):
                await self._done
        except TimeoutError:
            self._call.collect()

    def end(self) -> None:
        for segment, slot in self._slots:
            segment.unwatch(slot, self.look)


class OneOwner:
    """Sends whole calls to one server, which is described anew when it has changed."""

    def __init__(self) -> None:
        self._made: tuple[object, list[_native.Owner]] = None, []
        """What it was described by, and how; replaced as one, since several threads begin calls."""

    def begin(
        self,
        call: ExecuteCall,
        segments: Sequence[Segment] = (),
        *,
        checked: bool,
        chunk_bytes: int | None = None,
        looped: bool = False,
    ) -> _native.StraightCall | None:
        """See `_native.StraightCall`, for tensors as they travel, which it may raise `ValueError` for.

        In one request, or in several of at most `chunk_bytes` each way. Without `segments` they are messages. Sums
        that are worth it stay where they come.
        """
        sizes = chunk_bytes, call.hidden.shape[1], call.hidden.dtype, call.reply_dtype
        made_of = segments, call.model_fingerprint, call.placement_epoch, sizes
        known, owners = self._made
        if known != made_of:
            lanes, reply_room = [segment.lane for segment in segments], segments[0].reply_room if segments else 0
            chunk_tokens = MOST_TOKENS if chunk_bytes is None else tokens_within(chunk_bytes, *sizes[1:])
            owner = _native.Owner(
                0, lanes, call.model_fingerprint, call.placement_epoch, chunk_tokens, reply_room, checked
            )
            owners = [owner]
            self._made = made_of, owners
        traceparents = (call.traceparent,) if call.traceparent else ()
        terms = Terms(call.layer, call.hidden.dtype, call.reply_dtype, call.request_id, call.timeout, traceparents)
        ids, weights = call.expert_ids.contiguous(), call.weights.contiguous()
        return _native.StraightCall.begin(
            owners,
            call.hidden,
            ids,
            weights,
            terms,
            scales=call.scales,
            looped=looped,
            in_place=stays(call.hidden, call.reply_dtype),
        )
