"""Memory through which batches reach the GPU and results leave it, reused from batch to batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import Computed, DeviceSeconds, TokenBatch
from expertd.kernels.numerics.quantize import FP8

ALIGNMENT = 256
"""Bytes; the tensor memory accelerator asks for 16 of addresses, the allocator gives as much."""


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Where the parts of a batch of T tokens lie in one stretch of memory, so that a single copy can move them all.

    The hidden states are last: a copy that ends after the last token in use moves no more than it must.
    """

    tokens: int
    top_k: int
    hidden_size: int
    dtype: torch.dtype
    """Of the hidden states: float8_e4m3fn, which comes with scales, or bfloat16."""

    def batch(self, memory: Tensor) -> TokenBatch:
        """The batch that lies in `memory` [n] uint8."""
        parts = {name: self._part(memory, name) for name, _, columns in self._fields if columns}
        return TokenBatch(parts["hidden"], parts.get("scales"), parts["expert_ids"], parts["weights"])

    def num_bytes(self, tokens: int) -> int:
        """Bytes up to the end of the first `tokens` hidden states."""
        return self._offset("hidden") + tokens * self.hidden_size * self.dtype.itemsize

    @property
    def routing_bytes(self) -> int:
        """Bytes before the scales and hidden states."""
        return self._offset("scales")

    @property
    def _fields(self) -> tuple[tuple[str, torch.dtype, int], ...]:
        return (
            ("expert_ids", torch.int32, self.top_k),
            ("weights", torch.float32, self.top_k),
            ("scales", torch.float32, self.hidden_size // BLOCK if self.dtype == FP8 else 0),
            ("hidden", self.dtype, self.hidden_size),
        )

    def _part(self, memory: Tensor, wanted: str) -> Tensor:
        start = self._offset(wanted)
        dtype, columns = next((dtype, columns) for name, dtype, columns in self._fields if name == wanted)
        return memory[start : start + self.tokens * columns * dtype.itemsize].view(dtype).view(self.tokens, columns)

    def _offset(self, wanted: str) -> int:
        offset = 0
        for name, dtype, columns in self._fields:
            if name == wanted:
                break
            offset += _aligned(self.tokens * columns * dtype.itemsize)
        return offset


@dataclass(frozen=True, slots=True)
class Results:
    """Device memory for the counts of pairs and the sums of a batch, in one stretch."""

    memory: Tensor
    """[n] uint8."""
    num_experts: int
    hidden_size: int

    @classmethod
    def allocate(cls, tokens: int, num_experts: int, hidden_size: int, device: torch.device) -> Results:
        size = _aligned(4 * num_experts) + tokens * hidden_size * torch.float32.itemsize
        return cls(torch.empty(size, dtype=torch.uint8, device=device), num_experts, hidden_size)

    def used(self, tokens: int, dtype: torch.dtype) -> Results:
        """The part of the memory that holds the results of `tokens` tokens as `dtype`."""
        size = _aligned(4 * self.num_experts) + tokens * self.hidden_size * dtype.itemsize
        return Results(self.memory[:size], self.num_experts, self.hidden_size)

    @property
    def pairs(self) -> Tensor:
        """[E] int32."""
        return self.memory[: 4 * self.num_experts].view(torch.int32)

    def sums(self, dtype: torch.dtype) -> Tensor:
        """[T, H] of `dtype`."""
        return self.memory[_aligned(4 * self.num_experts) :].view(dtype).view(-1, self.hidden_size)


class Bay:
    """What one batch occupies while it is under way."""

    def __init__(self, largest: BatchShape, num_experts: int, device: torch.device) -> None:
        size = largest.num_bytes(largest.tokens)
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(size, dtype=torch.uint8, device=device)
        self.results = Results.allocate(largest.tokens, num_experts, largest.hidden_size, device)
        self.marks = tuple(torch.cuda.Event(enable_timing=True) for _ in range(6))
        """Begin and end of copying in, computing and copying out."""
        # Their views take longer to make than to fill, and most batches are as large as the one before.
        self.host_batch = lru_cache(1)(partial(BatchShape.batch, memory=self.host))
        self.device_batch = lru_cache(1)(partial(BatchShape.batch, memory=self.device))


def fill_batch(requests: Sequence[TokenBatch], target: TokenBatch) -> int:
    """Concatenate requests in `target`, whose other tokens get no expert; how many tokens there are.

    Hidden states that are on the GPU, and their scales, are left out.
    """
    tokens = fill_routing(requests, target)
    _concatenate([request.hidden for request in requests], _first(target.hidden, tokens))
    if tokens < target.num_tokens:
        target.expert_ids[tokens:] = -1
    return tokens


def fill_routing(requests: Sequence[TokenBatch], target: TokenBatch) -> int:
    """Concatenate everything but the hidden states, and scales on the GPU; how many tokens there are."""
    tokens = sum(request.num_tokens for request in requests)
    torch.cat([request.expert_ids for request in requests], out=_first(target.expert_ids, tokens))
    torch.cat([request.weights for request in requests], out=_first(target.weights, tokens))
    if target.scales is not None:
        scales = [request.scales for request in requests if request.scales is not None]
        _concatenate(scales, _first(target.scales, tokens))
    return tokens


def move_batch(requests: Sequence[TokenBatch], bay: Bay, shape: BatchShape) -> TokenBatch:
    """Copy requests, whose routing is in the bay's pinned memory, to the device on the current stream.

    Hidden states go request by request, so that the device reads one while the next is copied to pinned memory, and
    directly where the device can read the request's own memory. A single request that is on the GPU stays where it is.
    """
    host, device = bay.host_batch(shape), bay.device_batch(shape)
    resident = all(request.hidden.is_cuda for request in requests)
    routing = shape.routing_bytes if resident else shape.num_bytes(0)
    bay.device[:routing].copy_(bay.host[:routing], non_blocking=True)
    if resident and len(requests) == 1:
        return replace(device, hidden=requests[0].hidden, scales=requests[0].scales)
    for request, rows in zip(requests, _rows(requests), strict=True):
        if not request.hidden.is_cuda:
            source = request.hidden if reachable(request.hidden) else host.hidden[rows].copy_(request.hidden)
            device.hidden[rows].copy_(source, non_blocking=True)
    move_resident(requests, device)
    return device


def move_resident(requests: Sequence[TokenBatch], target: TokenBatch) -> None:
    """Copy hidden states and scales that are on the GPU already to their rows of `target`, on the current stream."""
    for request, rows in zip(requests, _rows(requests), strict=True):
        if request.hidden.is_cuda:
            target.hidden[rows].copy_(request.hidden, non_blocking=True)
            if target.scales is not None and request.scales is not None:
                target.scales[rows].copy_(request.scales, non_blocking=True)


def move_sums(requests: Sequence[TokenBatch], sums: Tensor) -> tuple[Tensor, ...]:
    """Copy device `sums` [T, H] to pinned memory, or to where requests want them, on the current stream."""
    if sums is requests[0].reply:
        return (sums,)
    counts = [request.num_tokens for request in requests]
    wanted = [request.reply if reachable(request.reply) else None for request in requests]
    if not any(target is not None for target in wanted):
        host = pinned(sums.shape, sums.dtype).copy_(sums, non_blocking=True)
        return torch.split(host, counts)
    return tuple(
        (pinned(part.shape, part.dtype) if target is None else target).copy_(part, non_blocking=True)
        for target, part in zip(wanted, torch.split(sums, counts), strict=True)
    )


def sums_target(requests: Sequence[TokenBatch], sums: Tensor) -> Tensor:
    """Where a batch's sums are to be computed: in `sums`, or at once where a single request on the GPU wants them."""
    reply = requests[0].reply
    return reply if len(requests) == 1 and reply is not None and reply.is_cuda else sums


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Host memory that the GPU copies to by itself, from PyTorch's cache of such memory."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


def reachable(tensor: Tensor | None) -> bool:
    """Whether the GPU can copy from and to a tensor's memory by itself."""
    return tensor is not None and (tensor.is_cuda or tensor.is_pinned())


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A batch under way on the GPU."""

    requests: Sequence[TokenBatch]
    sums: Sequence[Tensor]
    """[T, H] of each request, in memory that is written until the last mark."""
    pairs: Tensor
    """[E] int32, in host memory that belongs to the next batch after `release`."""
    marks: Sequence[torch.cuda.Event]
    """Begin and end of each of the three stages."""
    staged: float
    """Seconds that the host took to put the batch in pinned memory."""
    release: Callable[[], None]

    def result(self) -> Computed:
        try:
            self.marks[-1].synchronize()
            copied_in, computed, copied_out = (
                self.marks[begin].elapsed_time(self.marks[begin + 1]) / 1e3 for begin in (0, 2, 4)
            )
            pairs = self.pairs.clone()
        finally:
            self.release()
        started = time.perf_counter()
        sums = tuple(map(_delivered, self.requests, self.sums))
        copied_out += time.perf_counter() - started
        return Computed(sums, pairs, DeviceSeconds(self.staged + copied_in, computed, copied_out))


def _delivered(request: TokenBatch, sums: Tensor) -> Tensor:
    if request.reply is None or request.reply.data_ptr() == sums.data_ptr():
        return sums
    return request.reply.copy_(sums)


def _concatenate(parts: Sequence[Tensor], target: Tensor) -> None:
    """Like `torch.cat`, but rows of parts on the GPU are left as they are."""
    if not any(part.is_cuda for part in parts):
        torch.cat(list(parts), out=target)
        return
    for part, rows in zip(parts, torch.split(target, [len(part) for part in parts]), strict=True):
        if not part.is_cuda:
            rows.copy_(part)


def _rows(requests: Sequence[TokenBatch]) -> Iterator[slice]:
    """Where each request's tokens are in the batch."""
    first = 0
    for request in requests:
        yield slice(first, first + request.num_tokens)
        first += request.num_tokens


def _first(tensor: Tensor, rows: int) -> Tensor:
    """The first rows of a tensor, which is itself in the common case: a view costs more than a small copy."""
    return tensor if rows == len(tensor) else tensor[:rows]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
