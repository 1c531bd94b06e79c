"""Replaying golden batches on whatever computes experts, and comparing with the reference from the checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.numerics.quantize import FP8
from expertd.kernels.oracle.golden import (
    Agreement,
    compare_expert,
    compare_layer,
    expert_batch,
    expert_reference,
    layer_batch,
)
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import read_expert

Compute: TypeAlias = Callable[[int, TokenBatch], Awaitable[Tensor]]
"""(layer, batch with global expert ids) -> sums [T, H] float32."""


async def verify(
    checkpoint: Checkpoint,
    experts: Mapping[int, Sequence[int]],
    seed: int,
    max_tokens: int,
    compute: Compute,
    dtype: torch.dtype = FP8,
) -> AsyncGenerator[Agreement, None]:
    """Compare every one of `experts`, by layer, then each layer with all of its at once.

    `dtype` is what weights are served as. Batches have at most `max_tokens` tokens. One expert's matrices are in memory
    at a time, and all arithmetic happens on threads. Raises `CheckpointError`, or what `compute` raises.
    """

    config = checkpoint.config

    async def computed(layer: int, batch: TokenBatch) -> Tensor:
        return torch.cat([await compute(layer, part) for part in _split(batch, max_tokens)])

    # A coroutine's own steps must be short: it may share its event loop with requests.
    for layer, chosen in experts.items():
        mixed = await asyncio.to_thread(layer_batch, config, layer, chosen, seed)
        expected = torch.zeros(mixed.hidden.shape, dtype=torch.float32)
        for expert in chosen:
            batch = await asyncio.to_thread(expert_batch, config, layer, expert, seed)
            matrices = await asyncio.to_thread(read_expert, checkpoint, layer, expert, dtype)
            out = await computed(layer, batch)
            yield await asyncio.to_thread(compare_expert, layer, expert, out, batch, matrices)
            expected += await asyncio.to_thread(expert_reference, mixed, expert, matrices)
        yield await asyncio.to_thread(compare_layer, layer, await computed(layer, mixed), expected)


def _split(batch: TokenBatch, max_tokens: int) -> list[TokenBatch]:
    parts = (batch.hidden, batch.scales, batch.expert_ids, batch.weights)
    chunks = [[None] if part is None else part.split(max_tokens) for part in parts]
    return [TokenBatch(*chunk) for chunk in zip(*chunks, strict=True)]
