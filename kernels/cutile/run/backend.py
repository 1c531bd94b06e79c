"""The `cutile` backend: expert FFNs on an NVIDIA GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from expertd._native import CudaExecutor
from expertd.kernels.cutile.base.fp8 import has_fp8
from expertd.kernels.cutile.base.launch import Gpu
from expertd.kernels.cutile.base.shape import (
    MAX_EXPERTS,
    MAX_HIDDEN_SIZE,
    MAX_INTERMEDIATE_SIZE,
    SHAPE_CLASSES,
    ExpertShape,
    tokens_within_reach,
)
from expertd.kernels.cutile.dequant.halves import to_float16
from expertd.kernels.cutile.pipeline.arithmetic import DequantLayer, FastLayer, Layer, Pipeline, choose_pipeline
from expertd.kernels.cutile.pipeline.table import DEFAULT_CACHE, Machine, load_table
from expertd.kernels.cutile.run.adding import capture_adders
from expertd.kernels.cutile.run.batch import DeviceBatch, start_batch
from expertd.kernels.cutile.run.cache import log_toolchain, warn_unless_kept
from expertd.kernels.cutile.run.capture import Graphs
from expertd.kernels.memory.segments import reusable
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import (
    FEW_TOKENS,
    NOWHERE,
    DeviceMemory,
    LayerAddresses,
    LayerWeights,
    TokenBatch,
    UnsupportedShape,
    spliced,
)

log = logging.getLogger(__name__)

TIME_EVERY = 8
"""Of so many small batches of a kind one is timed: four events cost 5 us of their 47 to 70."""
EXPRESS_ROWS = 256
"""Batches of up to so many tokens are computed beside larger ones, where that takes some MB and not another layer's."""


class CutileBackend:
    """Computes on one GPU, through the native executor alone: by `submit`, until an engine takes that.

    BF16 weights are kept as FP16 of the same values, for the dequant pipeline, which "auto" then is.
    `pipeline` is "fast" (FP8 products, relative error below 3e-2), "dequant" (FP16 products, below 1e-3) or "auto":
    `choose_pipeline`. A token's bits never depend on the order of its batch; with `batch_invariant` they do not depend
    on its size either. Batches of up to `max_batch_tokens` tokens are taken; kernels compute at most `max_tokens` at
    once, fewer where their offsets reach less far, and longer batches in parts. Tokens have at most `max_top_k`
    experts.
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

    @property
    def device(self) -> str:
        return torch.cuda.get_device_name(self._device)

    def load_layer(self, layer: int, weights: LayerWeights) -> None:
        """Take a layer's weights. Raises `UnsupportedShape`; all layers have one shape, type and limit."""
        plain = weights.dtype == torch.bfloat16
        if plain and self._pipeline == "fast":
            raise UnsupportedShape("the fast pipeline computes with FP8 weights: choose dequant for BF16 ones")
        if not self._layers:
            self._shape, self._limit = _shape_of(weights), weights.swiglu_limit
            if self._pipeline == "auto":
                chosen = choose_pipeline(self._gpu.arch, self._table, self._shape)
                self._pipeline = "dequant" if plain else chosen
                log.info("pipeline %s", self._pipeline)
            self._allocate(weights)
        elif _shape_of(weights) != self._shape:
            raise UnsupportedShape(f"layer {layer} has {_shape_of(weights)}, the layers before it {self._shape}")
        elif weights.swiglu_limit != self._limit:
            raise UnsupportedShape(
                f"layer {layer} has swiglu_limit {weights.swiglu_limit}, the layers before it {self._limit}"
            )
        taken = to_float16(weights, self._device) if plain else _on(weights, self._device)
        self._layers[layer] = taken
        # For a layer that is made when there is no other: that of no experts.
        self._none = tuple(tensor.new_empty(0, *tensor.shape[1:]) for tensor in taken.tensors)

    def splice_layer(self, layer: int, base: int | None, kept: Mapping[int, int], added: LayerWeights) -> None:
        room, wanted = self._shape.num_experts, len(kept) + added.num_experts
        if wanted > room:
            raise UnsupportedShape(f"{wanted} experts of a layer: the kernels of this server were made for {room}")
        with torch.cuda.stream(torch.cuda.Stream(self._device)):
            new = to_float16(added, self._device) if added.dtype == torch.bfloat16 else added
            old = self._none if base is None else self._layers[base].tensors
            tensors = spliced(old, kept, new.tensors, room)
            torch.cuda.current_stream(self._device).synchronize()
        self._layers[layer] = LayerWeights(*tensors, swiglu_limit=added.swiglu_limit)

    def drop_layer(self, layer: int) -> None:
        self._layers.pop(layer, None)

    def warm_up(self) -> None:
        """Compile what every size class needs and capture its graphs."""
        log_toolchain()
        warn_unless_kept()
        self._graphs.capture_all(next(iter(self._layers.values())))

    def prepare_adding(self, devices: int) -> None:
        capture_adders(self._executor, devices, self._shape.hidden_size, self._device)

    def submit(self, layer: int, requests: Sequence[TokenBatch], reply_dtype: torch.dtype) -> DeviceBatch:
        tokens, top_k = sum(request.num_tokens for request in requests), requests[0].expert_ids.shape[1]
        if top_k > self._max_top_k:
            raise UnsupportedShape(f"{top_k} experts a token exceed max_top_k {self._max_top_k}")
        if tokens > self._max_batch_tokens:
            raise UnsupportedShape(f"{tokens} tokens exceed max_batch_tokens {self._max_batch_tokens}")
        weights = self._layers[layer]
        *_, rows = self._executor.cut(tokens, on_host=not all(request.hidden.is_cuda for request in requests))
        self._graphs.capture(weights, rows, requests[0].hidden.dtype, reply_dtype)
        return start_batch(self._executor, weights.addresses, requests, reply_dtype)

    def compute_beside(self, layer: int, request: TokenBatch) -> Tensor:
        weights = self._layers[layer]
        with torch.cuda.stream(torch.cuda.Stream(self._device)), torch.inference_mode():
            # Memory of its own for this one batch: the other kernels' may be in use.
            kernels = self._computing(weights, FEW_TOKENS)
            scales = None if request.scales is None else request.scales.to(self._device)
            ids, factors = request.expert_ids.to(self._device), request.weights.to(self._device)
            batch = TokenBatch(request.hidden.to(self._device), scales, ids, factors)
            sums = torch.empty(request.hidden.shape, device=self._device, dtype=torch.float32)
            pairs = torch.empty(weights.num_experts, dtype=torch.int32, device=self._device)
            kernels.compute(weights, batch, sums, pairs)
            return sums.cpu()

    def native_executor(self) -> CudaExecutor:
        return self._executor

    def layer_addresses(self, layer: int) -> LayerAddresses:
        return self._layers[layer].addresses if layer in self._layers else NOWHERE

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def memory(self) -> DeviceMemory:
        free, size = torch.cuda.mem_get_info(self._device)
        return DeviceMemory(
            size=size,
            free=free,
            allocated=torch.cuda.memory_allocated(self._device),
            reserved=torch.cuda.memory_reserved(self._device),
        )

    def count_usable(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + reusable(torch.cuda.memory_snapshot(), self._device_number)

    @property
    def _device_number(self) -> int:
        return torch.cuda.current_device() if self._device.index is None else self._device.index

    def _allocate(self, weights: LayerWeights) -> None:
        most = min(self._max_tokens, self._max_batch_tokens, tokens_within_reach(self._shape, self._max_top_k))
        self._executor = CudaExecutor(
            self._device_number,
            depth=self.depth,
            hidden_size=self._shape.hidden_size,
            num_experts=self._shape.num_experts,
            max_top_k=self._max_top_k,
            classes=[*(tokens for tokens in SHAPE_CLASSES if tokens < most), most],
            max_tokens=self._max_batch_tokens,
            time_every=TIME_EVERY,
            express_rows=0 if self._pipeline == "dequant" else EXPRESS_ROWS,
        )
        compute = self._computing(weights, most)
        express = self._computing(weights, min(most, EXPRESS_ROWS)) if self._executor.express_rows else compute
        self._graphs = Graphs(self._executor, compute, express, self._device)

    def _computing(self, weights: LayerWeights, max_tokens: int) -> Layer:
        """The kernels and, for batches of up to `max_tokens`, their memory."""
        common = (weights, self._table, self._gpu, self._device)
        if self._pipeline == "dequant":
            return DequantLayer(*common, batch_invariant=self._batch_invariant)
        return FastLayer(
            *common, max_tokens=max_tokens, max_top_k=self._max_top_k, batch_invariant=self._batch_invariant
        )


def _on(weights: LayerWeights, device: torch.device) -> LayerWeights:
    """A copy of theirs."""
    tensors = (tensor.to(device, copy=True) for tensor in weights.tensors)
    return LayerWeights(*tensors, swiglu_limit=weights.swiglu_limit)


def _shape_of(weights: LayerWeights) -> ExpertShape:
    """The shape of a layer's weights. Raises `UnsupportedShape`."""
    shape = ExpertShape(*weights.down.shape)
    other = "--backend torch takes any"
    for name, size, most, multiple, advice in (
        ("local experts", shape.num_experts, MAX_EXPERTS, 1, "share a layer's experts among more servers"),
        ("hidden size", shape.hidden_size, MAX_HIDDEN_SIZE, BLOCK, other),
        ("intermediate size", shape.intermediate_size, MAX_INTERMEDIATE_SIZE, BLOCK, other),
    ):
        if not 0 < size <= most or size % multiple:
            raise UnsupportedShape(f"{name} {size}: the kernels take multiples of {multiple} up to {most}; {advice}")
    return shape
