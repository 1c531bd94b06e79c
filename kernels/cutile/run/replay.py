"""Small batches as CUDA graphs: one launch copies a batch in and computes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch

from expertd.kernels.cutile.pipeline.arithmetic import Layer
from expertd.kernels.cutile.run.staging import (
    BatchShape,
    DeviceBatch,
    Results,
    fill_batch,
    move_resident,
    move_sums,
    pinned,
)
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch


class Replay:
    """Memory for one small batch at a time, at addresses that never change, and the graphs that work on it."""

    def __init__(
        self,
        largest: BatchShape,
        num_experts: int,
        compute: Layer,
        layers: Mapping[int, LayerWeights],
        device: torch.device,
    ) -> None:
        """Takes batches of up to `largest.tokens` tokens for any of `layers`."""
        size = largest.num_bytes(largest.tokens)
        self._host = pinned((size,), torch.uint8)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._results = Results.allocate(largest.tokens, num_experts, largest.hidden_size, device)
        self._pairs = pinned((num_experts,), torch.int32)
        # Recorded by the graphs, but for the last one.
        self._marks = tuple(torch.cuda.Event(enable_timing=True, external=True) for _ in range(3))
        self._end = torch.cuda.Event(enable_timing=True)
        self._compute = compute
        self._layers = layers
        self._graphs: dict[tuple[int, BatchShape, torch.dtype, bool], torch.cuda.CUDAGraph] = {}
        # Views of the memory take longer to make than to fill.
        self._host_batch = cache(partial(BatchShape.batch, memory=self._host))
        self._device_batch = cache(partial(BatchShape.batch, memory=self._memory))
        self._free = True

    def forget(self, layer: int) -> None:
        """Drop the graphs of a layer whose weights are replaced."""
        for key in [key for key in self._graphs if key[0] == layer]:
            del self._graphs[key]

    def submit(
        self, layer: int, requests: Sequence[TokenBatch], shape: BatchShape, reply_dtype: torch.dtype
    ) -> DeviceBatch | None:
        """Start computing requests, padded to `shape`; None for those that cannot be computed so.

        That is while the batch before has not been waited for, and where the hidden states of some but not all requests
        are on the GPU already.
        """
        resident = requests[0].hidden.is_cuda
        if not self._free or any(request.hidden.is_cuda != resident for request in requests):
            return None
        graph = self._graph(layer, shape, reply_dtype, resident)
        started = time.perf_counter()
        tokens = fill_batch(requests, self._host_batch(shape))
        staged = time.perf_counter() - started
        if resident:
            move_resident(requests, self._device_batch(shape))
        graph.replay()
        sums = move_sums(requests, self._results.used(tokens, reply_dtype).sums(reply_dtype))
        self._end.record()
        self._free = False
        begin, copied, computed = self._marks
        marks = (begin, copied, copied, computed, computed, self._end)
        return DeviceBatch(requests, sums, self._pairs, marks, staged, self._release)

    def _release(self) -> None:
        self._free = True

    def _graph(self, layer: int, shape: BatchShape, reply_dtype: torch.dtype, resident: bool) -> torch.cuda.CUDAGraph:
        """The graph of a padded batch, captured when it is first asked for. `resident`: it copies no hidden states."""
        key = (layer, shape, reply_dtype, resident)
        if key not in self._graphs:
            results = self._results.used(shape.tokens, reply_dtype)
            batch = self._device_batch(shape)
            used = shape.routing_bytes if resident else shape.num_bytes(shape.tokens)
            self._host_batch(shape).expert_ids.fill_(-1)

            def work(mark: Callable[[int], None]) -> None:
                mark(0)
                self._memory[:used].copy_(self._host[:used], non_blocking=True)
                mark(1)
                self._compute.compute(self._layers[layer], batch, results.sums(reply_dtype), results.pairs)
                mark(2)
                self._pairs.copy_(results.pairs, non_blocking=True)

            work(lambda _: None)  # compiles: that cannot happen in a capture
            torch.cuda.synchronize(self._memory.device)
            self._graphs[key] = torch.cuda.CUDAGraph()
            # Another thread may be waiting for a batch meanwhile.
            with torch.cuda.graph(self._graphs[key], capture_error_mode="thread_local"):
                work(lambda index: self._marks[index].record())
        return self._graphs[key]
