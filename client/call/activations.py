"""Hidden states on their way to servers: quantised block by block, the first ones sent before the last are ready."""

from __future__ import annotations

import asyncio

import torch
from torch import Tensor

from expertd.client.base.blocks import BLOCK_TOKENS, start_blocks
from expertd.client.call.arguments import check_finite
from expertd.client.call.dispatch import take_rows
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.quantize import FP8, quantize_activations
from expertd.kernels.numerics.tokens import quantize_into


class Activations:
    """[T, H] hidden states as servers get them: bfloat16, or FP8 with scales.

    Raises `InvalidBatch` for what is not finite, or has `take` do so.
    """

    def __init__(self, tokens: Tensor, dtype: torch.dtype) -> None:
        num_tokens, self.width = tokens.shape
        self._ready: list[asyncio.Future[None]] = []
        self._scales: Tensor | None = None
        if dtype != FP8:
            self._hidden = tokens.to(dtype)
            check_finite(self._hidden)
            return
        if tokens.is_cuda:
            self._hidden, self._scales = quantize_activations(tokens)
            if not self._scales.isfinite().all():
                check_finite(tokens)
            return
        hidden = self._hidden = torch.empty(tokens.shape, dtype=FP8, device="cpu")
        scales = self._scales = torch.empty(num_tokens, self.width // BLOCK, dtype=torch.float32, device="cpu")

        def quantize(rows: slice) -> None:
            if not quantize_into(tokens[rows], hidden[rows], scales[rows]):
                check_finite(tokens)

        self._ready = start_blocks(num_tokens, quantize)

    async def take(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states [n, H] and scales [n, H/128] of some tokens, ascending, as soon as they are there."""
        blocks = self._ready[int(tokens[0]) // BLOCK_TOKENS : int(tokens[-1]) // BLOCK_TOKENS + 1]
        if not all(block.done() for block in blocks):
            # Not awaited one by one: cancelling who waits would cancel the block for everyone.
            await asyncio.wait(blocks)
        for block in blocks:
            block.result()
        scales = None if self._scales is None else take_rows(self._scales, tokens)
        return take_rows(self._hidden, tokens), scales
