"""A server's verification of itself: its results against a reference from its own checkpoint, through its own queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from expertd.kernels.model.ranges import format_ranges
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.oracle.golden import Agreement
from expertd.kernels.oracle.verification import verify
from expertd.kernels.weights.checkpoint import CheckpointError
from expertd.proto import codec
from expertd.proto.base.errors import ModelMismatch, Overloaded, ServerFault, UnknownExpert
from expertd.proto.codec import ExecuteCall
from expertd.server.rpc.executor import EngineExecutor
from expertd.server.rpc.incoming import Incoming
from expertd.server.scheduling.generations import Generations

CALLER = "verify"
"""Who the engine gives a fair share."""


class Verifier:
    """Runs one verification at a time. Lives on the event loop."""

    def __init__(self, generations: Generations, executor: EngineExecutor, max_tokens: int) -> None:
        self.generations = generations
        self._executor = executor
        self._max_tokens = max_tokens
        self._busy = False

    async def run(
        self, layers: Sequence[int], experts: Sequence[int], seed: int, fingerprint: str = ""
    ) -> AsyncGenerator[Agreement, None]:
        """Verify `experts` of `layers`; empty: all that the server owns. `fingerprint` is that of the weights; empty:
        of those that serve.

        Raises `Unavailable`, `ModelMismatch`, `UnknownExpert`, `Overloaded` while another one runs, or `ServerFault`.
        """
        self._executor.check_open()
        serving = self.generations.serving
        generation = self.generations.named(fingerprint) if fingerprint else serving
        if generation is None:
            raise ModelMismatch(f"model_fingerprint is {fingerprint!r}; this server holds {serving.fingerprint!r}")
        chosen = _chosen(generation.shard.experts, layers, experts)
        if self._busy:
            raise Overloaded("another verification is running; wait for its end or cancel it")
        self._busy = True
        compute = partial(self._compute, generation.fingerprint)
        dtype = generation.shard.weight_dtype
        reports = verify(generation.checkpoint, chosen, seed, self._max_tokens, compute, dtype)
        try:
            async with contextlib.aclosing(reports):
                async for agreement in reports:
                    yield agreement
        except CheckpointError as error:
            raise ServerFault(f"the checkpoint can no longer be read: {error}") from error
        finally:
            self._busy = False

    async def _compute(self, fingerprint: str, layer: int, batch: TokenBatch) -> Tensor:
        # A server that drains has no time for what nobody waits for.
        self._executor.check_open()
        call = ExecuteCall(
            request_id=0,
            model_fingerprint=fingerprint,
            placement_epoch=None,
            layer=layer,
            hidden=batch.hidden,
            scales=batch.scales,
            expert_ids=batch.expert_ids,
            weights=batch.weights,
            reply_dtype=torch.float32,
        )
        computing = self._executor.submit(Incoming(codec.encode_call(call), CALLER))
        try:
            response = codec.parse_response(await asyncio.shield(computing.answer))
        except asyncio.CancelledError:
            computing.cancel()
            raise
        tokens, width = batch.hidden.shape
        return codec.decode_result(response, tokens, width, torch.float32).partials


def _chosen(
    owned: Mapping[int, tuple[int, ...]], layers: Sequence[int], experts: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """Those of `experts` in `layers`, which are all if they are empty, that are owned; each must be somewhere."""
    _check_owned("layers", layers, list(owned))
    chosen = {layer: owned[layer] for layer in sorted(set(layers)) or owned}
    _check_owned("experts", experts, sorted(set().union(*chosen.values())))
    if wanted := set(experts):
        chosen = {layer: tuple(expert for expert in its if expert in wanted) for layer, its in chosen.items()}
    return {layer: its for layer, its in chosen.items() if its}


def _check_owned(field: str, wanted: Sequence[int], owned: Sequence[int]) -> None:
    strangers = sorted(set(wanted) - set(owned))
    if strangers:
        raise UnknownExpert(f"{field} holds {strangers[0]}; this server owns {field} {format_ranges(owned)}")
