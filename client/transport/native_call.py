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
from expertd.kernels.numerics.tokens import FORMATS, place, vector
from expertd.proto.codec import DTYPE_CODES, ExecuteCall
from expertd.proto.lane.layout import tokens_within

LONG_ELEMENTS = 1 << 20
"""Of hidden states that an event loop has other threads write: half a millisecond."""
NO_SCALES = (0, 0)
MOST_TOKENS = 1 << 31
"""Of one message: servers have a bound of their own."""
QUANTISED = FORMATS[torch.bfloat16]
"""Of hidden states that come with scales: any format, since they are only copied."""


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


def begin(
    owners: Sequence[_native.Owner],
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    terms: Terms,
    *,
    scales: Tensor | None = None,
    chosen: Tensor | None = None,
    looped: bool = False,
) -> _native.StraightCall | None:
    """Send [T, H] hidden states with contiguous [T, k] int32 or int64 ids and float32 weights, all on the CPU.

    They go to the `chosen` owner of each expert, [shares, n_routed_experts] int64, for as many shares of the
    tokens, one after another, or all to the only one. With `scales` [T, H/128] hidden states
    are FP8 already. None where the straight way is none, whatever the reason.
    """
    pairs, (tokens, width) = ids.numel(), hidden.shape
    return _native.StraightCall.begin(
        owners,
        place(hidden, hidden.dtype, hidden.shape),
        QUANTISED if scales is not None else FORMATS[hidden.dtype],
        tokens,
        width,
        vector(ids, ids.dtype, pairs),
        ids.dtype == torch.int64,
        vector(weights, torch.float32, pairs),
        ids.shape[1],
        0 if chosen is None else vector(chosen.reshape(-1), torch.int64, chosen.numel()),
        0 if chosen is None else chosen.shape[1],
        0 if chosen is None else len(chosen),
        NO_SCALES if scales is None else place(scales, torch.float32, scales.shape),
        terms.layer,
        DTYPE_CODES[terms.hidden_dtype],
        DTYPE_CODES[terms.reply_dtype],
        terms.request_id,
        terms.timeout,
        terms.traceparents,
        looped,
    )


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
            segment.unwatch(slot)


class OneOwner:
    """Sends whole calls to one server, which is described anew when it has changed."""

    def __init__(self) -> None:
        self._owner: tuple[object, _native.Owner] | None = None

    def begin(
        self,
        call: ExecuteCall,
        lanes: Sequence[_native.ClientLane],
        reply_room: int,
        *,
        checked: bool,
        chunk_bytes: int | None = None,
        looped: bool = False,
    ) -> _native.StraightCall | None:
        """See `begin`, for tensors as they travel: in one request, or in several of at most `chunk_bytes` each way."""
        sizes = chunk_bytes, call.hidden.shape[1], call.hidden.dtype, call.reply_dtype
        made_of = lanes, call.model_fingerprint, call.placement_epoch, sizes
        if self._owner is None or self._owner[0] != made_of:
            chunk_tokens = MOST_TOKENS if chunk_bytes is None else tokens_within(chunk_bytes, *sizes[1:])
            self._owner = made_of, _native.Owner(0, *made_of[:3], chunk_tokens, reply_room, checked)
        traceparents = [call.traceparent] if call.traceparent else []
        terms = Terms(call.layer, call.hidden.dtype, call.reply_dtype, call.request_id, call.timeout, traceparents)
        ids, weights = call.expert_ids.contiguous(), call.weights.contiguous()
        return begin([self._owner[1]], call.hidden, ids, weights, terms, scales=call.scales, looped=looped)
