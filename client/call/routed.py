"""One call of a layer, from routed tokens to its result: the straight way first, and the long one for what is left."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from expertd.client.call.activations import Activations
from expertd.client.call.arguments import check_choice
from expertd.client.call.caller import Caller, Superseded
from expertd.client.call.dispatch import renormalize
from expertd.client.call.failover import LayerCall
from expertd.client.call.result import Effort, MoeResult, combine_all, experts_of, report
from expertd.client.call.straight import Outcome, Part, Soon, StraightCall, begin
from expertd.client.fleet.groups import name_experts
from expertd.client.transport.native_call import LONG_ELEMENTS
from expertd.kernels.memory.results import empty
from expertd.proto.base.errors import DeadlineExceeded

log = logging.getLogger(__name__)


class RoutedCall:
    """Tokens of one layer with the experts that were chosen for them; its time begins with it."""

    def __init__(
        self, caller: Caller, layer: int, tokens: Tensor, ids: Tensor, weights: Tensor, shape: torch.Size
    ) -> None:
        """[T, H] hidden states and [T, k] ids and weights, which are not checked yet; the output has `shape`."""
        self._caller = caller
        self._fingerprint = caller.membership.holdings.draw()
        self._layer = layer
        self._tokens = tokens
        self._ids = ids
        self._weights = weights
        self._shape = shape
        self._deadline = time.monotonic() + caller.config.call_timeout
        self.is_long = tokens.numel() > LONG_ELEMENTS
        self._straight: StraightCall | None = None
        self._given_up = False

    def begin(self, soon: Soon | None = None) -> StraightCall | None:
        """See `straight.begin`."""
        routed = self._tokens, self._ids, self._weights
        return begin(self._caller, self._fingerprint, self._layer, *routed, self._shape, self._deadline, soon)

    async def execute(self) -> MoeResult:
        """The result, on the event loop."""
        if self.is_long:
            return await self._execute_beside()
        straight = self.begin()
        return await (self.finish() if straight is None else self.collect(straight))

    async def collect(self, straight: StraightCall) -> MoeResult:
        """The result of what was begun, of few tokens."""
        with straight:
            await straight.answered()
            result = self.result_of(straight)
            return await self.finish(straight.outcomes()) if result is None else result

    async def _execute_beside(self) -> MoeResult:
        """On a thread, which writes many tokens, and adds their sums while others are on their way."""
        loop = asyncio.get_running_loop()
        try:
            done = await loop.run_in_executor(self._caller.threads, self._go_straight, loop.call_soon_threadsafe)
        except asyncio.CancelledError:
            self._given_up = True
            if self._straight is not None:
                self._straight.give_up()
            raise
        return done if isinstance(done, MoeResult) else await self.finish(done)

    def _go_straight(self, soon: Soon) -> MoeResult | Sequence[tuple[Part, Outcome]] | None:
        """The result, or what became of the parts if one has failed; None for the long way."""
        straight = self._straight = self.begin(soon)
        if straight is None:
            return None
        with straight:
            if self._given_up:
                straight.give_up()
            return self.result_of(straight) or straight.outcomes()

    def result_of(self, straight: StraightCall) -> MoeResult | None:
        """None when a part has failed."""
        sums = straight.sums()
        return None if sums is None else MoeResult(*sums, Effort(), model_fingerprint=self._fingerprint)

    async def finish(self, outcomes: Sequence[tuple[Part, Outcome]] | None = None) -> MoeResult:
        """Compute what the straight way did not: all of it, or what failed of `outcomes`.

        All of it anew where the weights that it began with are gone meanwhile: no sum has parts of two generations.
        """
        while True:
            try:
                return await self._finish(outcomes)
            except Superseded:
                if time.monotonic() >= self._deadline:
                    raise DeadlineExceeded("the weights were replaced, and call_timeout has passed") from None
                self._fingerprint, outcomes = self._caller.membership.holdings.draw(), None

    async def _finish(self, outcomes: Sequence[tuple[Part, Outcome]] | None) -> MoeResult:
        caller, config, tokens = self._caller, self._caller.config, self._tokens
        if outcomes is None:
            check_choice(self._ids, self._weights, caller.membership.holdings.ownership.config)
        ids, weights = self._ids.to(torch.int32), self._weights.float()
        call = LayerCall(
            caller, self._fingerprint, self._layer, Activations(tokens, config.hidden_dtype), self._deadline
        )
        answers = await (call.run(ids, weights) if outcomes is None else call.mend(outcomes))
        dtype = torch.float32 if call.missing else config.output_dtype
        sums = tokens.new_empty(tokens.shape, dtype=dtype) if tokens.is_cuda else empty(tokens.shape, dtype)
        await combine_all(sums, answers)
        degraded = renormalize(sums, ids, weights, call.missing) if call.missing else 0
        lost = experts_of(call.missing)
        if degraded:
            log.warning("layer %d: %d of %d tokens lack %s", self._layer, degraded, len(tokens), name_experts(lost))
        output = sums.to(config.output_dtype).reshape(self._shape)
        return MoeResult(output, report(answers), call.effort, degraded, lost, self._fingerprint)
