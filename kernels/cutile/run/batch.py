"""Batches of tensors in the hands of the native executor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertd.kernels.cutile.run.capture import CODES
from expertd.kernels.numerics.backend import Computed, DeviceSeconds, LayerAddresses, TokenBatch

if TYPE_CHECKING:
    from expertd._native import CudaBatch, CudaExecutor


class Reach(IntEnum):
    """How the device reaches a request's hidden states and sums: through staging, by itself, or at home."""

    PAGEABLE = 0
    PINNED = 1
    DEVICE = 2


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A batch under way on the GPU."""

    executor: CudaExecutor
    native: CudaBatch
    sums: tuple[Tensor, ...]
    """[T, H] of each request, in memory that is written until the batch is over."""

    def result(self) -> Computed:
        self.executor.wait(self.native)
        pairs = torch.tensor(self.native.pairs, dtype=torch.int32)
        return Computed(self.sums, pairs, DeviceSeconds(*self.native.seconds))


def start_batch(
    executor: CudaExecutor, layer: LayerAddresses, requests: Sequence[TokenBatch], reply_dtype: torch.dtype
) -> DeviceBatch:
    """Start computing requests of one dtype and one top_k. What streams do with tensors on the GPU must be done."""
    sums = tuple(_room(request, reply_dtype) if request.reply is None else request.reply for request in requests)
    routing = [(request.expert_ids.contiguous(), request.weights.contiguous()) for request in requests]
    listed = [
        (
            request.hidden.data_ptr(),
            0 if request.scales is None else request.scales.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
            request.num_tokens,
            _reach(request.hidden, out),
        )
        for request, (ids, weights), out in zip(requests, routing, sums, strict=True)
    ]
    first = requests[0]
    kind = (CODES[first.hidden.dtype], CODES[reply_dtype], first.expert_ids.shape[1])
    return DeviceBatch(executor, executor.start(layer, *kind, listed, keep=(requests, routing, sums)), sums)


def _room(request: TokenBatch, dtype: torch.dtype) -> Tensor:
    hidden = request.hidden
    return torch.empty(hidden.shape, dtype=dtype, device=hidden.device, pin_memory=hidden.is_pinned())


def _reach(hidden: Tensor, sums: Tensor) -> Reach:
    if hidden.is_cuda and sums.is_cuda:
        return Reach.DEVICE
    if hidden.is_cuda or sums.is_cuda:
        raise ValueError("hidden states and sums of a request are both on the GPU, or neither is")
    return Reach.PINNED if hidden.is_pinned() and sums.is_pinned() else Reach.PAGEABLE
