"""The arithmetic of a layer on one GPU: either pipeline, in the configuration of the batch's shape class."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from expertd.kernels.cutile.base.fp8 import has_fp8
from expertd.kernels.cutile.base.launch import Gpu
from expertd.kernels.cutile.base.shape import SHAPE_CLASSES, ExpertShape
from expertd.kernels.cutile.dequant.layer import DequantConfig, DequantPipeline
from expertd.kernels.cutile.dequant.layer import default_config as default_dequant_config
from expertd.kernels.cutile.fast.layer import Workspace, layer_launches
from expertd.kernels.cutile.fast.tiles import LayerConfig, default_config
from expertd.kernels.cutile.pipeline.table import Table
from expertd.kernels.cutile.routing.quantize import quantize_activations
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import FP8

Pipeline = Literal["auto", "fast", "dequant"]
MAX_TILE_ROWS = 128


class Layer(Protocol):
    """Computes any layer of one shape, on the current stream and without waiting for the device."""

    max_graph_tokens: int
    """Up to this many tokens the work of a batch is the same for every batch, so that a graph can replay it."""

    def compute(self, weights: LayerWeights, batch: TokenBatch, sums: Tensor, pairs: Tensor) -> None:
        """Write `sums` [T, H] and `pairs` [E] int32 of a device batch."""


class FastLayer:
    """FP8 products; at most `max_tokens` tokens at once, longer batches in parts."""

    def __init__(
        self,
        weights: LayerWeights,
        table: Table,
        gpu: Gpu,
        device: torch.device,
        *,
        max_tokens: int,
        max_top_k: int,
        batch_invariant: bool,
        max_graph_tokens: int,
    ) -> None:
        self.max_graph_tokens = min(max_graph_tokens, max_tokens)
        self._shape = ExpertShape(*weights.down.shape)
        self._table, self._gpu = table, gpu
        self._max_tokens = max_tokens
        self._batch_invariant = batch_invariant
        self._workspace = Workspace.allocate(max_tokens, max_top_k, weights, MAX_TILE_ROWS, device)
        width = self._shape.hidden_size
        self._quantized = torch.empty(max_tokens, width, dtype=FP8, device=device)
        self._scales = torch.empty(max_tokens, width // BLOCK, device=device)

    def compute(self, weights: LayerWeights, batch: TokenBatch, sums: Tensor, pairs: Tensor) -> None:
        for first in range(0, batch.num_tokens, self._max_tokens):
            part = _part(batch, first, self._max_tokens)
            counted = pairs if first == 0 else self._workspace.schedule.pairs
            self._compute_part(weights, part, sums[first : first + part.num_tokens], counted)
            if first:
                pairs += counted

    def _compute_part(self, weights: LayerWeights, batch: TokenBatch, sums: Tensor, pairs: Tensor) -> None:
        tokens = batch.num_tokens
        if batch.scales is None:
            hidden, scales = self._quantized[:tokens], self._scales[:tokens]
            quantize_activations(batch.hidden, hidden, scales)()
            batch = TokenBatch(hidden, scales, batch.expert_ids, batch.weights)
        workspace = replace(self._workspace, schedule=replace(self._workspace.schedule, pairs=pairs))
        for launch in layer_launches(batch, weights, sums, workspace, self._config(tokens), self._gpu.processors):
            launch()

    def _config(self, num_tokens: int) -> LayerConfig:
        known = self._table.get("fast", self._shape.key(num_tokens), LayerConfig)
        if known is None or (self._batch_invariant and known.few_rows):
            return default_config(num_tokens, self._batch_invariant)
        return known


class DequantLayer:
    """FP16 products of dequantised weights."""

    max_graph_tokens = 0

    def __init__(
        self, weights: LayerWeights, table: Table, gpu: Gpu, device: torch.device, *, batch_invariant: bool
    ) -> None:
        self._shape = ExpertShape(*weights.down.shape)
        self._table, self._gpu = table, gpu
        self._batch_invariant = batch_invariant
        shape = self._shape
        self._pipeline = DequantPipeline(shape.num_experts, shape.hidden_size, shape.intermediate_size, device, gpu)

    def compute(self, weights: LayerWeights, batch: TokenBatch, sums: Tensor, pairs: Tensor) -> None:
        partials = self._pipeline(batch, weights, self._config(batch.num_tokens))
        sums.copy_(partials.sums)
        pairs.copy_(partials.pairs)

    def _config(self, num_tokens: int) -> DequantConfig:
        if self._batch_invariant:
            # One configuration for every batch: tiles of other sizes may round differently.
            return default_dequant_config(self._gpu.arch, SHAPE_CLASSES[0])
        known = self._table.get("dequant", self._shape.key(num_tokens), DequantConfig)
        return known or default_dequant_config(self._gpu.arch, num_tokens)


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
