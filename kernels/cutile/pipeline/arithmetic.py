"""The arithmetic of a layer on one GPU: either pipeline, in the configuration of the batch's shape class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from expertd.kernels.cutile.base.fp8 import has_fp8
from expertd.kernels.cutile.base.launch import Gpu, Launch
from expertd.kernels.cutile.base.shape import SHAPE_CLASSES, ExpertShape
from expertd.kernels.cutile.dequant.layer import DequantConfig, DequantPipeline
from expertd.kernels.cutile.dequant.layer import default_config as default_dequant_config
from expertd.kernels.cutile.fast.layer import Workspace, layer_steps
from expertd.kernels.cutile.fast.tiles import LayerConfig, default_config, gathering
from expertd.kernels.cutile.pipeline.table import Table
from expertd.kernels.cutile.routing.quantize import quantize_activations
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import FP8

Pipeline = Literal["auto", "fast", "dequant"]
MAX_TILE_ROWS = 128
STEPS = 4
"""In which columns of sums are computed for another GPU: the link there is idle until the first one is done."""
STEP_TOKENS = 4096
"""From this class on they are computed so. The sums of half as many tokens are 29 MB, 0.08 ms of NVLink."""


class Layer(Protocol):
    """Computes any layer of one shape, on the current stream and without waiting for the device."""

    def compute(self, weights: LayerWeights, batch: TokenBatch, sums: Tensor, pairs: Tensor) -> None:
        """Write `sums` [T, H] and `pairs` [E] int32 of a device batch.

        By kernels, whose addresses a graph can be told anew, and not by copies; in the same way for every batch of T.
        """

    def steps(
        self, weights: LayerWeights, batch: TokenBatch, sums: Tensor, pairs: Tensor
    ) -> Sequence[Callable[[], None]]:
        """What does the same, one after another, each leaving as many columns of `sums`; one, where it is not cut."""


class FastLayer:
    """FP8 products; at most `max_tokens` tokens at once."""

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
    ) -> None:
        self._shape = ExpertShape(*weights.down.shape)
        self._table, self._gpu = table, gpu
        self._batch_invariant = batch_invariant
        self._workspace = Workspace.allocate(max_tokens, max_top_k, weights, MAX_TILE_ROWS, device)
        width = self._shape.hidden_size
        self._quantized = torch.empty(max_tokens, width, dtype=FP8, device=device)
        self._scales = torch.empty(max_tokens, width // BLOCK, device=device, dtype=torch.float32)

    def compute(self, weights: LayerWeights, batch: TokenBatch, sums: Tensor, pairs: Tensor) -> None:
        for launches in self._launches(weights, batch, sums, pairs, 1):
            _launch(launches)

    def steps(
        self, weights: LayerWeights, batch: TokenBatch, sums: Tensor, pairs: Tensor
    ) -> Sequence[Callable[[], None]]:
        blocks = self._shape.hidden_size // BLOCK
        count = next(steps for steps in range(STEPS, 0, -1) if blocks % steps == 0)
        return [partial(_launch, step) for step in self._launches(weights, batch, sums, pairs, count)]

    def _launches(
        self, weights: LayerWeights, batch: TokenBatch, sums: Tensor, pairs: Tensor, steps: int
    ) -> list[list[Launch]]:
        tokens = batch.num_tokens
        quantize: list[Launch] = []
        if batch.scales is None:
            hidden, scales = self._quantized[:tokens], self._scales[:tokens]
            quantize = [quantize_activations(batch.hidden, hidden, scales)]
            batch = TokenBatch(hidden, scales, batch.expert_ids, batch.weights)
        workspace = replace(self._workspace, schedule=replace(self._workspace.schedule, pairs=pairs))
        config, processors = self._config(tokens), self._gpu.processors
        first, *others = layer_steps(batch, weights, sums, workspace, config, processors, steps)
        return [[*quantize, *first], *others]

    def _config(self, num_tokens: int) -> LayerConfig:
        known = self._table.get("fast", self._shape.key(num_tokens), LayerConfig)
        if known is None or (self._batch_invariant and known.few_rows):
            known = default_config(self._gpu.arch, num_tokens, self._batch_invariant)
        return gathering(known)


class DequantLayer:
    """FP16 products of dequantised weights, or of such as are FP16."""

    def __init__(
        self, weights: LayerWeights, table: Table, gpu: Gpu, device: torch.device, *, batch_invariant: bool
    ) -> None:
        self._shape = ExpertShape(*weights.down.shape)
        self._table, self._gpu = table, gpu
        self._batch_invariant = batch_invariant
        shape = self._shape
        self._pipeline = DequantPipeline(
            shape.num_experts, shape.hidden_size, shape.intermediate_size, device, gpu, dtype=weights.dtype
        )

    def compute(self, weights: LayerWeights, batch: TokenBatch, sums: Tensor, pairs: Tensor) -> None:
        partials = self._pipeline(batch, weights, self._config(batch.num_tokens))
        torch.mul(partials.sums, 1.0, out=sums)
        torch.mul(partials.pairs, 1, out=pairs)

    def steps(
        self, weights: LayerWeights, batch: TokenBatch, sums: Tensor, pairs: Tensor
    ) -> Sequence[Callable[[], None]]:
        return [partial(self.compute, weights, batch, sums, pairs)]

    def _config(self, num_tokens: int) -> DequantConfig:
        if self._batch_invariant:
            # One configuration for every batch: tiles of other sizes may round differently.
            return default_dequant_config(self._gpu.arch, SHAPE_CLASSES[0])
        known = self._table.get("dequant", self._shape.key(num_tokens), DequantConfig)
        return known or default_dequant_config(self._gpu.arch, num_tokens)


def _launch(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch()


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
