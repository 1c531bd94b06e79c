"""The `torch` backend: expert FFNs in FP32 on the CPU, for machines without a GPU and for tests."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from expertd.kernels.numerics.backend import (
    NOWHERE,
    Computed,
    DeviceSeconds,
    LayerAddresses,
    LayerWeights,
    Partials,
    TokenBatch,
    spliced,
)
from expertd.kernels.numerics.quantize import dequantize_activations, dequantize_weights
from expertd.kernels.numerics.swiglu import swiglu
from expertd.kernels.numerics.token_sort import sort_pairs

ROW_BLOCK = 16
"""Rows of every matrix product. One fixed shape makes a token's bits independent of the rest of its batch."""


class TorchBackend:
    """Keeps FP32 weights (four times the FP8 bytes, twice those of BF16); batch-invariant, no second quantisation."""

    name = "torch"
    depth = 1

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._limit: float | None = None

    @property
    def device(self) -> str:
        return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"

    def load_layer(self, layer: int, weights: LayerWeights) -> None:
        self._layers[layer], self._limit = _plain(weights), weights.swiglu_limit

    def splice_layer(self, layer: int, base: int | None, kept: Mapping[int, int], added: LayerWeights) -> None:
        new = _plain(added)
        up_gate, down = spliced(new if base is None else self._layers[base], kept, new, len(kept) + added.num_experts)
        self._layers[layer], self._limit = (up_gate, down), added.swiglu_limit

    def drop_layer(self, layer: int) -> None:
        self._layers.pop(layer, None)

    def warm_up(self) -> None:
        """Nothing to do."""

    def prepare_adding(self, devices: int) -> None:
        """Nothing to do: sums are in host memory."""

    def count_usable(self) -> None:
        """The operating system knows."""

    def memory(self) -> None:
        """A CPU has none of its own."""

    def submit(self, layer: int, requests: Sequence[TokenBatch], reply_dtype: torch.dtype) -> Finished:
        started = time.perf_counter()
        batch = _merge(requests)
        merged = time.perf_counter()
        partials = self.execute(layer, batch)
        computed = time.perf_counter()
        sums = partials.sums.to(reply_dtype).split([request.num_tokens for request in requests])
        return Finished(
            Computed(
                sums=tuple(map(_replied, requests, sums)),
                pairs=partials.pairs,
                seconds=DeviceSeconds(merged - started, computed - merged, time.perf_counter() - computed),
            )
        )

    def compute_beside(self, layer: int, request: TokenBatch) -> Tensor:
        return self.submit(layer, [request], torch.float32).result().sums[0]

    def native_executor(self) -> None:
        """There is none: `submit` computes."""

    def layer_addresses(self, layer: int) -> LayerAddresses:
        return NOWHERE

    def synchronize(self) -> None:
        """Nothing to do: a batch is computed when `submit` returns."""

    @torch.inference_mode()
    def execute(self, layer: int, batch: TokenBatch) -> Partials:
        up_gate, down = self._layers[layer]
        scales = batch.scales
        hidden = batch.hidden.float() if scales is None else dequantize_activations(batch.hidden, scales)
        order = sort_pairs(batch.expert_ids, len(down))
        pair_weights = batch.weights.reshape(-1, 1)
        sums = torch.zeros_like(hidden)
        first = 0
        for expert, count in enumerate(order.counts.tolist()):
            pairs = slice(first, first + count)
            tokens, choices = order.tokens[pairs], order.choices[pairs]
            if count:
                rows = _expert_ffn(hidden[tokens], up_gate[expert], down[expert], self._limit)
                sums.index_add_(0, tokens, rows * pair_weights[choices])
            first += count
        return Partials(sums=sums, pairs=order.counts.to(torch.int32))


def _plain(weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """FP32 up_gate [E, 2I, H] and down [E, H, I]."""
    return (
        dequantize_weights(weights.up_gate, weights.up_gate_scales),
        dequantize_weights(weights.down, weights.down_scales),
    )


@dataclass(frozen=True, slots=True)
class Finished:
    """A batch that was computed by the time `submit` returned."""

    computed: Computed

    def result(self) -> Computed:
        return self.computed


def _merge(requests: Sequence[TokenBatch]) -> TokenBatch:
    """One batch with the tokens of all requests, in their order."""
    if len(requests) == 1:
        return requests[0]
    scales = [request.scales for request in requests if request.scales is not None]
    return TokenBatch(
        hidden=torch.cat([request.hidden for request in requests]),
        scales=torch.cat(scales) if scales else None,
        expert_ids=torch.cat([request.expert_ids for request in requests]),
        weights=torch.cat([request.weights for request in requests]),
    )


def _replied(request: TokenBatch, sums: Tensor) -> Tensor:
    """`sums`, in the memory that the request wants them in."""
    return sums if request.reply is None else request.reply.copy_(sums)


def _expert_ffn(hidden: Tensor, up_gate: Tensor, down: Tensor, limit: float | None) -> Tensor:
    """[m, H] rows through one expert -> [m, H], in products of exactly `ROW_BLOCK` rows."""
    blocks = pad(hidden, (0, 0, 0, -len(hidden) % ROW_BLOCK)).unflatten(0, (-1, ROW_BLOCK))
    return torch.cat([_ffn(block, up_gate, down, limit) for block in blocks])[: len(hidden)]


def _ffn(hidden: Tensor, up_gate: Tensor, down: Tensor, limit: float | None) -> Tensor:
    up, gate = linear(hidden, up_gate).chunk(2, dim=-1)
    return linear(swiglu(up, gate, limit), down)
