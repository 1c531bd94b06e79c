"""Calls of transformers' models that are work on their GPU's stream."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from expertd.client.sync import SyncCoordinator
from expertd.proto.base.errors import InvalidBatch, NotPermitted, Overloaded

log = logging.getLogger(__name__)
MOST_TOKENS = 1024
"""Enough for decoding, and little of a GPU's memory."""


class Streams:
    """Of one coordinator and the first GPU that has tensors for it, if its servers share memory with this process."""

    def __init__(self, moe: SyncCoordinator, most_tokens: int) -> None:
        self._moe = moe
        self._most_tokens = most_tokens
        self._sides: dict[torch.device, torch.cuda.Stream | None] = {}

    def side(self, hidden: Tensor) -> torch.cuda.Stream | None:
        """What a call of hidden [T, H] can run on beside other work; None if it must go another way."""
        if not hidden.is_cuda or len(hidden) > self._most_tokens:
            return None
        if hidden.device not in self._sides:
            self._sides[hidden.device] = self._prepare(hidden.device)
        return self._sides[hidden.device]

    def call(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """See `SyncCoordinator.on_stream`; the last layer waits, as nobody may choose a token by what failed."""
        output = self._moe.on_stream(layer, hidden, ids, weights)
        if layer == self._moe.layers[-1] and not torch.cuda.is_current_stream_capturing():
            self._moe.check()
        return output

    def _prepare(self, device: torch.device) -> torch.cuda.Stream | None:
        if any(self._sides.values()):
            log.warning("calls on the stream are of one GPU; those of %s go another way", device)
            return None
        try:
            self._moe.prepare_stream(self._most_tokens, device)
        except (NotPermitted, InvalidBatch, Overloaded) as error:
            log.info("no calls on the stream of %s: %s", device, error)
            return None
        return torch.cuda.Stream(device)


def beside(side: torch.cuda.Stream, aside: Callable[[], Tensor], here: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What `aside` gives on the stream `side`, and `here` on the current one meanwhile, which goes on with both."""
    current = torch.cuda.current_stream(side.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        first = aside()
    second = here()
    current.wait_stream(side)
    first.record_stream(current)
    return first, second
