"""The `cutile` backend: expert FFNs on an NVIDIA GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from expertd.kernels.backend import LayerWeights, Partials, TokenBatch, UnsupportedShape
from expertd.kernels.config import BLOCK
from expertd.kernels.cutile.dequant_pipeline import DequantConfig, DequantPipeline
from expertd.kernels.cutile.dequant_pipeline import default_config as default_dequant_config
from expertd.kernels.cutile.fast_layer import Workspace, layer_launches
from expertd.kernels.cutile.fp8 import has_fp8
from expertd.kernels.cutile.inputs import ExpertShape
from expertd.kernels.cutile.launch import Gpu
from expertd.kernels.cutile.quantize import quantize_activations
from expertd.kernels.cutile.staging import Staging
from expertd.kernels.cutile.tiles import SHAPE_CLASSES, LayerConfig, default_config, shape_class
from expertd.kernels.cutile.tuning import DEFAULT_CACHE, Machine, Table, load_table

log = logging.getLogger(__name__)

Pipeline = Literal["auto", "fast", "dequant"]
MAX_TILE_ROWS = 128
MAX_HIDDEN_SIZE = 8192
MAX_INTERMEDIATE_SIZE = 4096
MAX_EXPERTS = 64
GRAPH_TOKENS = 256
"""Up to this many tokens a batch is padded to its shape class and replayed as a CUDA graph."""


class CutileBackend:
    """Computes on one GPU. What `execute` returns is overwritten by the next `execute`: call `copy_out` before it.

    `pipeline` is "fast" (FP8 products, relative error below 3e-2), "dequant" (FP16 products, below 1e-3) or "auto":
    `choose_pipeline`. A token's bits never depend on the order of its batch; with `batch_invariant` they do not depend
    on its size either. Batches of more than `max_tokens` tokens are computed in parts. `sums_dtype` is that of the sums
    on the device: bfloat16 spares a pass over memory where replies have that type.
    """

    name = "cutile"

    def __init__(
        self,
        pipeline: Pipeline = "auto",
        *,
        batch_invariant: bool = False,
        max_tokens: int = SHAPE_CLASSES[-1],
        max_slots: int = 8,
        sums_dtype: torch.dtype = torch.float32,
        device: str = "cuda",
        cache: Path = DEFAULT_CACHE,
    ) -> None:
        self._device = torch.device(device)
        self._gpu = Gpu.of(self._device)
        if pipeline == "fast" and not has_fp8(self._gpu.arch):
            raise UnsupportedShape(f"{self.device} ({self._gpu.arch}) has no FP8: choose the dequant pipeline")
        self._pipeline = pipeline
        self._batch_invariant = batch_invariant
        self._max_tokens = max_tokens
        self._max_slots = max_slots
        self._sums_dtype = sums_dtype
        self._table = load_table(Machine.detect(), cache)
        self._layers: dict[int, LayerWeights] = {}
        self._graphs: dict[tuple[int, int, int, torch.dtype], torch.cuda.CUDAGraph] = {}

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
        for key in [key for key in self._graphs if key[0] == layer]:
            del self._graphs[key]

    def warm_up(self) -> None:
        """Compile what every shape class needs and capture the graphs of small batches of every layer."""
        for tokens in SHAPE_CLASSES:
            for layer in self._layers if tokens <= GRAPH_TOKENS else list(self._layers)[:1]:
                # Kernels are compiled once for sizes that are multiples of 16 and once for others.
                for size in {tokens, max(tokens - 1, 1)}:
                    if size <= self._max_tokens:
                        self.execute(layer, self._staging.blank(size, self._max_slots))
        torch.cuda.synchronize(self._device)

    def copy_in(self, batches: Sequence[TokenBatch]) -> TokenBatch:
        return self._staging.copy_in(batches)

    @torch.inference_mode()
    def execute(self, layer: int, batch: TokenBatch) -> Partials:
        weights = self._layers[layer]
        if batch.expert_ids.shape[1] > self._max_slots:
            raise UnsupportedShape(f"{batch.expert_ids.shape[1]} experts a token exceed max_slots {self._max_slots}")
        if self._pipeline == "dequant":
            return self._dequant(batch, weights, self._dequant_config(batch.num_tokens))
        if batch.num_tokens <= min(GRAPH_TOKENS, self._max_tokens):
            return self._replay(layer, batch)
        sums = torch.empty(batch.hidden.shape, dtype=self._sums_dtype, device=self._device)
        parts = range(0, batch.num_tokens, self._max_tokens)
        pairs = torch.zeros(weights.num_experts, dtype=torch.int32, device=self._device)
        for first in parts:
            self._launch(weights, _part(batch, first, self._max_tokens), sums[first:])
            pairs += self._workspace.schedule.pairs
        return Partials(sums=sums, pairs=pairs)

    def synchronize(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def copy_out(self, partials: Partials, dtype: torch.dtype) -> Partials:
        return self._staging.copy_out(partials, dtype)

    def _allocate(self, weights: LayerWeights) -> None:
        self._staging = Staging(self._max_tokens, self._max_slots, self._shape.hidden_size, self._device)
        if self._pipeline == "dequant":
            shape = (self._shape.num_experts, self._shape.hidden_size, self._shape.intermediate_size)
            self._dequant = DequantPipeline(*shape, self._device, self._gpu)
            return
        self._workspace = Workspace.allocate(self._max_tokens, self._max_slots, weights, MAX_TILE_ROWS, self._device)
        self._graph_sums = torch.empty(
            GRAPH_TOKENS, self._shape.hidden_size, dtype=self._sums_dtype, device=self._device
        )

    def _config(self, num_tokens: int) -> LayerConfig:
        known = self._table.get("fast", self._shape.key(num_tokens), LayerConfig)
        if known is None or (self._batch_invariant and known.few_rows):
            return default_config(num_tokens, self._batch_invariant)
        return known

    def _dequant_config(self, num_tokens: int) -> DequantConfig:
        if self._batch_invariant:
            # One configuration for every batch: tiles of other sizes may round differently.
            return default_dequant_config(self._gpu.arch, SHAPE_CLASSES[0])
        known = self._table.get("dequant", self._shape.key(num_tokens), DequantConfig)
        return known or default_dequant_config(self._gpu.arch, num_tokens)

    def _launch(self, weights: LayerWeights, batch: TokenBatch, sums: Tensor) -> None:
        """Compute `sums[:T]`, and the pairs of each expert in the workspace's schedule."""
        if batch.scales is None:
            hidden, scales = self._staging.quantized(batch.num_tokens)
            quantize_activations(batch.hidden, hidden, scales)()
            batch = TokenBatch(hidden, scales, batch.expert_ids, batch.weights)
        config = self._config(batch.num_tokens)
        for launch in layer_launches(
            batch, weights, sums[: batch.num_tokens], self._workspace, config, self._gpu.processors
        ):
            launch()

    def _replay(self, layer: int, batch: TokenBatch) -> Partials:
        """Run a small batch as the graph of its shape class, from the buffers that the graph was captured with."""
        tokens = min(shape_class(batch.num_tokens), self._max_tokens)
        padded = self._staging.pad(batch, tokens)
        key = (layer, tokens, batch.expert_ids.shape[1], batch.hidden.dtype)
        if key not in self._graphs:
            self._graphs[key] = self._capture(layer, padded)
        self._graphs[key].replay()
        return Partials(sums=self._graph_sums[: batch.num_tokens], pairs=self._workspace.schedule.pairs)

    def _capture(self, layer: int, batch: TokenBatch) -> torch.cuda.CUDAGraph:
        self._launch(self._layers[layer], batch, self._graph_sums)  # compiles: that cannot happen in a capture
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch(self._layers[layer], batch, self._graph_sums)
        return graph


def choose_pipeline(arch: str, table: Table, shape: ExpertShape) -> Pipeline:
    """The pipeline that was measured to be faster for the largest shape class that has an entry, or the fast one.

    A GPU without FP8 has the `dequant` pipeline only.
    """
    if not has_fp8(arch):
        return "dequant"
    for tokens in reversed(SHAPE_CLASSES):
        measured = table.get("pipeline", shape.key(tokens), str)
        if measured is not None:
            return "dequant" if measured == "dequant" else "fast"
    return "fast"


def _part(batch: TokenBatch, first: int, tokens: int) -> TokenBatch:
    if batch.num_tokens <= tokens:
        return batch
    rows = slice(first, first + tokens)
    scales = None if batch.scales is None else batch.scales[rows]
    return TokenBatch(batch.hidden[rows], scales, batch.expert_ids[rows], batch.weights[rows])


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
