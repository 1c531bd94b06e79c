"""Host and device buffers through which batches reach the GPU and results leave it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertd.kernels.backend import Partials, TokenBatch
from expertd.kernels.config import BLOCK
from expertd.kernels.quantize import FP8


class Staging:
    """Fixed device buffers for batches of up to `max_tokens` tokens, at whose addresses CUDA graphs find their input.

    Larger batches get memory of their own. Host memory is pinned, from PyTorch's cache of such memory.
    """

    def __init__(self, max_tokens: int, max_slots: int, hidden_size: int, device: torch.device) -> None:
        self._device = device
        self._max_tokens = max_tokens
        self._slots = max_slots
        self._width = hidden_size
        self._buffers: dict[tuple[torch.dtype, str], Tensor] = {}

    def copy_in(self, batches: Sequence[TokenBatch]) -> TokenBatch:
        """Concatenate host batches of one dtype along T on the device."""
        scales = [batch.scales for batch in batches if batch.scales is not None]
        return TokenBatch(
            hidden=self._moved("hidden", [batch.hidden for batch in batches]),
            scales=self._moved("scales", scales) if scales else None,
            expert_ids=self._moved("expert_ids", [batch.expert_ids for batch in batches]),
            weights=self._moved("weights", [batch.weights for batch in batches]),
        )

    def copy_out(self, partials: Partials, dtype: torch.dtype) -> Partials:
        """The partials in host memory that stays as it is, the sums as `dtype`; waits for the device."""
        sums = partials.sums.to(dtype)
        out = Partials(sums=_pinned(sums.shape, dtype), pairs=_pinned(partials.pairs.shape, torch.int32))
        out.sums.copy_(sums, non_blocking=True)
        out.pairs.copy_(partials.pairs, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return out

    def pad(self, batch: TokenBatch, tokens: int) -> TokenBatch:
        """`batch` in the fixed buffers, made up to `tokens` tokens with ones that have no expert."""
        padded = self._views(tokens, batch.expert_ids.shape[1], batch.hidden.dtype)
        count = batch.num_tokens
        for name in ("hidden", "scales", "expert_ids", "weights"):
            source, target = getattr(batch, name), getattr(padded, name)
            if source is not None and source.data_ptr() != target.data_ptr():
                target[:count].copy_(source)
        padded.expert_ids[count:] = -1
        return padded

    def blank(self, tokens: int, slots: int) -> TokenBatch:
        """A batch of zeros whose first token goes to expert 0, for warming up."""
        batch = self._views(tokens, slots, FP8)
        for tensor in (batch.hidden.view(torch.uint8), batch.scales, batch.weights):
            if tensor is not None:
                tensor.zero_()
        batch.expert_ids.fill_(-1)
        batch.expert_ids[0, 0] = 0
        return batch

    def quantized(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Buffers for `tokens` tokens in FP8 and their scales, for hidden states that came as bfloat16."""
        return (
            self._buffer("quantized", FP8, self._width)[: tokens * self._width].view(tokens, self._width),
            self._buffer("scales", torch.float32, self._width // BLOCK)[: tokens * self._width // BLOCK].view(
                tokens, -1
            ),
        )

    def _views(self, tokens: int, slots: int, dtype: torch.dtype) -> TokenBatch:
        def view(name: str, kind: torch.dtype, columns: int) -> Tensor:
            widest = self._slots if name in ("expert_ids", "weights") else columns
            return self._buffer(name, kind, widest)[: tokens * columns].view(tokens, columns)

        return TokenBatch(
            hidden=view("hidden", dtype, self._width),
            scales=view("scales", torch.float32, self._width // BLOCK) if dtype == FP8 else None,
            expert_ids=view("expert_ids", torch.int32, slots),
            weights=view("weights", torch.float32, slots),
        )

    def _buffer(self, name: str, dtype: torch.dtype, columns: int) -> Tensor:
        """The fixed buffer of a name and dtype, [max_tokens * columns], allocated when first needed."""
        if (dtype, name) not in self._buffers:
            self._buffers[dtype, name] = torch.empty(self._max_tokens * columns, dtype=dtype, device=self._device)
        return self._buffers[dtype, name]

    def _moved(self, name: str, parts: list[Tensor]) -> Tensor:
        tokens, columns = sum(len(part) for part in parts), parts[0].shape[1]
        dtype = parts[0].dtype
        widest = self._slots if name in ("expert_ids", "weights") else columns
        if tokens > self._max_tokens or columns > widest:
            target = torch.empty(tokens, columns, dtype=dtype, device=self._device)
        else:
            target = self._buffer(name, dtype, widest)[: tokens * columns].view(tokens, columns)
        host = _pinned((tokens, columns), dtype)
        torch.cat(parts, out=host)
        return target.copy_(host, non_blocking=True)


def _pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
