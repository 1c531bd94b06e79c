"""What all stream-ordered calls of one caller have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expertd.client.transport.segment import REQUEST_BYTES
from expertd.proto import codec
from expertd.proto.codec import ExecuteCall
from expertd.proto.lane.layout import ALIGNMENT, Layout, lay_out, reply_room


@dataclass(frozen=True, slots=True)
class Terms:
    """What all stream-ordered calls of one caller have in common."""

    model_fingerprint: str
    layers: tuple[int, ...]
    sizes: tuple[int, ...]
    """Tokens that calls are padded to, ascending."""
    width: int
    top_k: int
    experts: int
    """Of the model."""
    hidden_dtype: torch.dtype
    reply_dtype: torch.dtype
    device: torch.device
    timeout: float
    """Seconds that an answer may take."""

    def layout(self, size: int, offset: int, gpu_offset: int | None) -> Layout:
        return lay_out(offset, gpu_offset, size, self.width, self.top_k, self.hidden_dtype, self.reply_dtype)

    def encode(self, index: int, layer: int, size: int, offset: int, gpu_offset: int | None) -> bytes:
        """The request with that number, whose tensors lie at these offsets."""
        there = torch.device("meta")
        hidden = torch.empty(size, self.width, dtype=self.hidden_dtype, device=there)
        ids = torch.empty(size, self.top_k, dtype=torch.int32, device=there)
        call = ExecuteCall(index, self.model_fingerprint, None, layer, hidden, None, ids, ids, self.reply_dtype)
        return codec.encode_call(call, offset, gpu_offset)


def slot_bytes(terms: Terms) -> int:
    """From one slot to the next."""
    return ALIGNMENT + REQUEST_BYTES + reply_room(terms.experts)
