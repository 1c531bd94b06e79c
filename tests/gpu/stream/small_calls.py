"""Every kernel of stream-ordered calls, for few tokens in one process, as compute-sanitizer wants them.

compute-sanitizer --tool memcheck python -m tests.gpu.stream.small_calls
compute-sanitizer --tool racecheck python -m tests.gpu.stream.small_calls
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertd.client.stream import kernels
from expertd.client.stream.launch import FEW_TOKENS, enqueue
from expertd.client.stream.tables import Tables
from expertd.client.stream.terms import Terms, slot_bytes
from expertd.kernels.numerics.quantize import FP8, dequantize_activations, quantize_activations

GPU = torch.device("cuda", 0)
WIDTH, TOP_K, EXPERTS, SERVERS, ENTRIES = 384, 4, 8, 2, 64
SIZES = (1, 8, 300)
"""The last is more than every server gets whole."""
SLOTS = kernels.RING.value + ENTRIES * kernels.ENTRY_BYTES.value


class Answering:
    """A lane that answers by itself: the sums are the hidden states, times the weights of their experts."""

    def __init__(self, terms: Terms, tables: Tables, number: int) -> None:
        self._terms, self._tables, self._number = terms, tables, number
        slots = len(terms.layers) * len(terms.sizes) * slot_bytes(terms)
        self._segment = torch.zeros(SLOTS + slots, dtype=torch.uint8).pin_memory()
        self._words: npt.NDArray[np.uint32] = self._segment.numpy().view(np.uint32)
        most = terms.sizes[-1]
        self._hidden = torch.zeros(most, WIDTH, dtype=terms.hidden_dtype, device=GPU)
        self._scales = torch.zeros(most, WIDTH // 128, device=GPU)
        self._sums = torch.full((most, WIDTH), torch.nan, dtype=terms.reply_dtype, device=GPU)
        self._ids = torch.full((most, TOP_K), -7, dtype=torch.int32).pin_memory()
        self._weights = torch.zeros(most, TOP_K).pin_memory()
        self._posted = 0

    def places(self) -> npt.NDArray[np.int64]:
        """[classes, FIELDS], see `kernels`."""
        tensors = (self._hidden, self._scales, self._ids, self._weights, self._sums)
        addresses = [tensor.data_ptr() for tensor in tensors]
        slots = [SLOTS + index * slot_bytes(self._terms) for index in range(len(self._terms.sizes))]
        rows = zip(slots, self._terms.sizes, strict=True)
        return np.array([[self._segment.data_ptr(), ENTRIES, slot, size, *addresses] for slot, size in rows], np.int64)

    def wait(self) -> None:
        """Answer what was posted, as the server whose turn it is; on the host, so that nothing waits on the device."""
        torch.cuda.synchronize()
        posted = int(self._words[kernels.TAIL.value // 4])
        if posted == self._posted:
            return
        self._posted = posted
        entry = kernels.RING.value + (posted - 1) % ENTRIES * kernels.ENTRY_BYTES.value
        slot = int(self._words[entry // 4])
        assert self._words[slot // 4] == kernels.POSTED.value, "the slot is posted"
        size = self._terms.sizes[(slot - SLOTS) // slot_bytes(self._terms) % len(self._terms.sizes)]
        ids, weights, hidden = self._ids[:size].to(GPU), self._weights[:size].to(GPU), self._hidden[:size].float()
        assert bool((ids >= -1).all()), "every row of the class has ids"
        if self._terms.hidden_dtype == FP8:
            hidden = dequantize_activations(self._hidden[:size], self._scales[:size])
        self._sums[:size] = (hidden * (weights * (ids >= 0)).sum(1, keepdim=True)).to(self._terms.reply_dtype)
        torch.cuda.synchronize()
        owed = int(self._tables.sent[2 * self._number]) & 0xFFFFFFFF
        self._words[(slot + kernels.CODE.value) // 4 : (slot + kernels.CODE.value) // 4 + 2] = 0, owed
        self._words[slot // 4] = kernels.DONE.value
        self._words[kernels.ANSWERED.value // 4] = 1


def check(hidden_dtype: torch.dtype, reply_dtype: torch.dtype) -> None:
    """Calls of every kind. Raises AssertionError for a wrong sum."""
    terms = Terms("small", (1,), SIZES, WIDTH, TOP_K, EXPERTS, hidden_dtype, reply_dtype, GPU, 1.0)
    tables = Tables.empty(SERVERS, terms)
    lanes = [Answering(terms, tables, number) for number in range(SERVERS)]
    owners = (torch.arange(EXPERTS) % SERVERS).to(torch.int32)[None].to(GPU)
    tables.renew(lanes, owners)  # type: ignore[arg-type]
    for tokens in (1, 5, FEW_TOKENS + 1, SIZES[-1]):
        hidden = torch.randn(tokens, WIDTH, device=GPU).bfloat16()
        for kind in (torch.int32, torch.int64):
            ids = torch.rand(tokens, EXPERTS, device=GPU).argsort(dim=1)[:, :TOP_K].to(kind).contiguous()
            ids[torch.rand(tokens, device=GPU) < 0.2] = -1
            weights = torch.rand(tokens, TOP_K, device=GPU)
            out = torch.full_like(hidden, torch.nan)
            enqueue(terms, tables, lanes, 0, hidden, ids, weights, out)  # type: ignore[arg-type]
            expected = _sent(hidden, hidden_dtype) * (weights * (ids >= 0)).sum(1, keepdim=True)
            worst = ((out.float() - expected).abs() / (1 + expected.abs())).max().item()
            assert worst < 0.02, f"{tokens} tokens, {hidden_dtype}: {worst}"
            print(f"{tokens} tokens, {hidden_dtype}, {reply_dtype}, {kind}: off by {worst:.1e}", flush=True)


def _sent(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What servers get of hidden states [T, H], in float32."""
    if dtype != FP8:
        return hidden.float()
    quantized, scales = quantize_activations(hidden.float().cpu())
    return dequantize_activations(quantized, scales).to(GPU)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="other dtypes than those calls have by default, too")
    kinds = [(FP8, torch.bfloat16), (torch.bfloat16, torch.float32)]
    for hidden_dtype, reply_dtype in kinds if parser.parse_args().all else kinds[:1]:
        check(hidden_dtype, reply_dtype)
    torch.cuda.synchronize()
