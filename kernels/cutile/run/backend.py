"""The `cutile` backend: expert FFNs on an NVIDIA GPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import torch

from expertd.kernels.cutile.base.fp8 import has_fp8
from expertd.kernels.cutile.base.launch import Gpu
from expertd.kernels.cutile.base.shape import SHAPE_CLASSES, ExpertShape, shape_class
from expertd.kernels.cutile.pipeline.arithmetic import DequantLayer, FastLayer, Layer, Pipeline, choose_pipeline
from expertd.kernels.cutile.pipeline.table import DEFAULT_CACHE, Machine, load_table
from expertd.kernels.cutile.run.replay import Replay
from expertd.kernels.cutile.run.staging import (
    BatchShape,
    Bay,
    DeviceBatch,
    fill_routing,
    move_batch,
    move_sums,
    pinned,
    sums_target,
)
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import DeviceMemory, LayerWeights, TokenBatch, UnsupportedShape
from expertd.kernels.numerics.quantize import FP8
from expertd.kernels.numerics.threads import compute_alone

log = logging.getLogger(__name__)

MAX_HIDDEN_SIZE = 8192
MAX_INTERMEDIATE_SIZE = 4096
MAX_EXPERTS = 64
GRAPH_TOKENS = 256
"""Up to this many tokens a batch is padded to its shape class and replayed as a CUDA graph."""


class CutileBackend:
    """Computes on one GPU: copies and kernels of successive batches overlap, on three streams.

    `pipeline` is "fast" (FP8 products, relative error below 3e-2), "dequant" (FP16 products, below 1e-3) or "auto":
    `choose_pipeline`. A token's bits never depend on the order of its batch; with `batch_invariant` they do not depend
    on its size either. Batches of up to `max_batch_tokens` tokens are taken; kernels compute at most `max_tokens` at
    once, longer batches in parts. Tokens have at most `max_top_k` experts.
    """

    name = "cutile"
    depth = 2

    def __init__(
        self,
        pipeline: Pipeline = "auto",
        *,
        batch_invariant: bool = False,
        max_batch_tokens: int = SHAPE_CLASSES[-1],
        max_tokens: int = SHAPE_CLASSES[-1],
        max_top_k: int = 8,
        device: str = "cuda",
        cache: Path = DEFAULT_CACHE,
    ) -> None:
        self._device = torch.device(device)
        self._gpu = Gpu.of(self._device)
        if pipeline == "fast" and not has_fp8(self._gpu.arch):
            raise UnsupportedShape(f"{self.device} ({self._gpu.arch}) has no FP8: choose the dequant pipeline")
        self._pipeline = pipeline
        self._batch_invariant = batch_invariant
        self._max_batch_tokens = max_batch_tokens
        self._max_tokens = max_tokens
        self._max_top_k = max_top_k
        self._table = load_table(Machine.detect(), cache)
        self._layers: dict[int, LayerWeights] = {}
        self._bays: SimpleQueue[Bay] = SimpleQueue()
        self._inward, self._outward = (torch.cuda.Stream(self._device) for _ in range(2))

    @property
    def device(self) -> str:
        return torch.cuda.get_device_name(self._device)

    def load_layer(self, layer: int, weights: LayerWeights) -> None:
        """Take a layer's weights. Raises `UnsupportedShape`; all layers have one shape."""
        if not self._layers:
            self._shape = _shape_of(weights)
            if self._pipeline == "auto":
                self._pipeline = choose_pipeline(self._gpu.arch, self._table, self._shape)
                log.info("pipeline %s", self._pipeline)
            self._allocate(weights)
        elif _shape_of(weights) != self._shape:
            raise UnsupportedShape(f"layer {layer} has {_shape_of(weights)}, the layers before it {self._shape}")
        self._layers[layer] = LayerWeights(
            *(
                tensor.to(self._device, copy=True)
                for tensor in (weights.up_gate, weights.up_gate_scales, weights.down, weights.down_scales)
            )
        )
        self._replay.forget(layer)

    def warm_up(self) -> None:
        """Compile what every shape class needs and capture the graphs of small batches of every layer."""
        first = next(iter(self._layers))
        for tokens in (tokens for tokens in SHAPE_CLASSES if tokens <= self._max_batch_tokens):
            for layer in self._layers if tokens <= GRAPH_TOKENS else (first,):
                for reply_dtype in (torch.bfloat16, torch.float32):
                    # Kernels are compiled once for sizes that are multiples of 16 and once for others.
                    for size in {tokens, max(tokens - 1, 1)}:
                        self.submit(layer, [self._blank(size, FP8)], reply_dtype).result()
            self.submit(first, [self._blank(tokens, torch.bfloat16)], torch.bfloat16).result()
        # The host's part is small from now on: spread over all cores it would take them from the callers beside us.
        compute_alone(torch.get_num_threads())

    @torch.inference_mode()
    def submit(self, layer: int, requests: Sequence[TokenBatch], reply_dtype: torch.dtype) -> DeviceBatch:
        tokens, top_k = sum(request.num_tokens for request in requests), requests[0].expert_ids.shape[1]
        if top_k > self._max_top_k:
            raise UnsupportedShape(f"{top_k} experts a token exceed max_top_k {self._max_top_k}")
        if tokens > self._max_batch_tokens:
            raise UnsupportedShape(f"{tokens} tokens exceed max_batch_tokens {self._max_batch_tokens}")
        shape = BatchShape(tokens, top_k, self._shape.hidden_size, requests[0].hidden.dtype)
        if tokens <= self._compute.max_graph_tokens:
            padded = replace(shape, tokens=min(shape_class(tokens), self._compute.max_graph_tokens))
            batch = self._replay.submit(layer, requests, padded, reply_dtype)
            if batch is not None:
                return batch
        bay = self._bays.get_nowait()
        try:
            return self._stream(bay, layer, requests, shape, reply_dtype)
        except BaseException:
            self._bays.put(bay)
            raise

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def _stream(
        self, bay: Bay, layer: int, requests: Sequence[TokenBatch], shape: BatchShape, reply_dtype: torch.dtype
    ) -> DeviceBatch:
        """Copy in, compute and copy out on a stream each, to overlap those of the batches before and after."""
        started, marks = time.perf_counter(), bay.marks
        kernels = torch.cuda.current_stream(self._device)
        results = bay.results.used(shape.tokens, reply_dtype)
        fill_routing(requests, bay.host_batch(shape))
        staged = time.perf_counter() - started
        with torch.cuda.stream(self._inward):
            marks[0].record()
            batch = move_batch(requests, bay, shape)
            marks[1].record()
        kernels.wait_event(marks[1])
        marks[2].record()
        computed = sums_target(requests, results.sums(reply_dtype))
        self._compute.compute(self._layers[layer], batch, computed, results.pairs)
        marks[3].record()
        with torch.cuda.stream(self._outward):
            self._outward.wait_event(marks[3])
            marks[4].record()
            pairs = pinned(results.pairs.shape, torch.int32).copy_(results.pairs, non_blocking=True)
            sums = move_sums(requests, computed)
            marks[5].record()
        return DeviceBatch(requests, sums, pairs, marks, staged, partial(self._bays.put, bay))

    def memory(self) -> DeviceMemory:
        free, size = torch.cuda.mem_get_info(self._device)
        return DeviceMemory(
            size=size,
            free=free,
            allocated=torch.cuda.memory_allocated(self._device),
            reserved=torch.cuda.memory_reserved(self._device),
        )

    def _allocate(self, weights: LayerWeights) -> None:
        experts, width = self._shape.num_experts, self._shape.hidden_size
        largest = BatchShape(self._max_batch_tokens, self._max_top_k, width, torch.bfloat16)
        for _ in range(self.depth):
            self._bays.put(Bay(largest, experts, self._device))
        common = (weights, self._table, self._gpu, self._device)
        if self._pipeline == "dequant":
            self._compute: Layer = DequantLayer(*common, batch_invariant=self._batch_invariant)
        else:
            self._compute = FastLayer(
                *common,
                max_tokens=min(self._max_tokens, self._max_batch_tokens),
                max_top_k=self._max_top_k,
                batch_invariant=self._batch_invariant,
                max_graph_tokens=GRAPH_TOKENS,
            )
        small = replace(largest, tokens=GRAPH_TOKENS)
        self._replay = Replay(small, experts, self._compute, self._layers, self._device)

    def _blank(self, tokens: int, dtype: torch.dtype) -> TokenBatch:
        """A batch of zeros whose first token goes to expert 0, for warming up."""
        width = self._shape.hidden_size
        ids = torch.full((tokens, self._max_top_k), -1, dtype=torch.int32)
        ids[0, 0] = 0
        scales = torch.ones(tokens, width // BLOCK) if dtype == FP8 else None
        return TokenBatch(torch.zeros(tokens, width, dtype=dtype), scales, ids, torch.ones(ids.shape))


def _shape_of(weights: LayerWeights) -> ExpertShape:
    """The shape of a layer's weights. Raises `UnsupportedShape`."""
    shape = ExpertShape(*weights.down.shape)
    for name, size, most, multiple in (
        ("local experts", shape.num_experts, MAX_EXPERTS, 1),
        ("hidden size", shape.hidden_size, MAX_HIDDEN_SIZE, BLOCK),
        ("intermediate size", shape.intermediate_size, MAX_INTERMEDIATE_SIZE, BLOCK),
    ):
        if not 0 < size <= most or size % multiple:
            raise UnsupportedShape(f"{name} {size}: the kernels take multiples of {multiple} up to {most}")
    return shape
