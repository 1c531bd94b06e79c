"""A server's verification of itself: its results against a reference from its own checkpoint, through its own queue."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence

import torch
from torch import Tensor

from expertd.kernels.model.ranges import format_ranges
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.oracle.golden import Agreement
from expertd.kernels.oracle.verification import verify
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.proto.base.errors import Overloaded, ServerFault, UnknownExpert
from expertd.proto.codec import ExecuteCall
from expertd.server.scheduling.batching import Scheduler
from expertd.server.scheduling.shard import Shard

CALLER = "verify"
"""Who the scheduler gives a fair share."""


class Verifier:
    """Runs one verification at a time. Lives on the event loop."""

    def __init__(self, checkpoint: Checkpoint, shard: Shard, scheduler: Scheduler, max_tokens: int) -> None:
        self._checkpoint = checkpoint
        self._shard = shard
        self._scheduler = scheduler
        self._max_tokens = max_tokens
        self._busy = False

    async def run(self, layers: Sequence[int], experts: Sequence[int], seed: int) -> AsyncGenerator[Agreement, None]:
        """Verify `experts` of `layers`; empty: all that the server owns.

        Raises `Unavailable`, `UnknownExpert`, `Overloaded` while another one runs, or `ServerFault`.
        """
        self._scheduler.check_open()
        chosen_layers = _chosen("layers", layers, self._shard.layers)
        chosen_experts = _chosen("experts", experts, self._shard.experts)
        if self._busy:
            raise Overloaded("another verification is running; wait for its end or cancel it")
        self._busy = True
        reports = verify(self._checkpoint, chosen_layers, chosen_experts, seed, self._max_tokens, self._compute)
        try:
            async with contextlib.aclosing(reports):
                async for agreement in reports:
                    yield agreement
        except CheckpointError as error:
            raise ServerFault(f"the checkpoint can no longer be read: {error}") from error
        finally:
            self._busy = False

    async def _compute(self, layer: int, batch: TokenBatch) -> Tensor:
        # A server that drains has no time for what nobody waits for.
        self._scheduler.check_open()
        call = ExecuteCall(
            request_id=0,
            model_fingerprint=self._shard.model_fingerprint,
            placement_epoch=None,
            layer=layer,
            hidden=batch.hidden,
            scales=batch.scales,
            expert_ids=batch.expert_ids,
            weights=batch.weights,
            reply_dtype=torch.float32,
        )
        done = await self._scheduler.execute(CALLER, layer, self._shard.admit(call), torch.float32, timeout=None)
        return done.partials.sums


def _chosen(field: str, wanted: Sequence[int], owned: tuple[int, ...]) -> tuple[int, ...]:
    strangers = sorted(set(wanted) - set(owned))
    if strangers:
        raise UnknownExpert(f"{field} holds {strangers[0]}; this server owns {field} {format_ranges(owned)}")
    return tuple(sorted(set(wanted))) or owned
