"""Graphs of a layer's kernels for the native executor, which launches them with any layer's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from expertd.kernels.cutile.pipeline.arithmetic import Layer
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import FP8

CODES = {FP8: 1, torch.bfloat16: 2, torch.float32: 3}
"""Of `DType` in proto/expert_shard.proto."""
KINDS = tuple(product((FP8, torch.bfloat16), (torch.bfloat16, torch.float32)))
"""Dtypes of hidden states and replies."""


class Executor(Protocol):
    """The native executor before it serves."""

    @property
    def depth(self) -> int:
        """Bays: batches that may be under way at once."""

    @property
    def classes(self) -> Sequence[int]:
        """The token counts that batches are padded to."""

    @property
    def max_top_k(self) -> int:
        """Ids of a token in a batch; those that a request lacks are -1."""

    def places(self, bay: int, tokens: int, hidden_dtype: int, reply_dtype: int) -> Mapping[str, int]:
        """Device addresses of ids, weights, hidden, scales, sums and pairs of a batch in a bay."""

    def add_graph(
        self,
        bay: int,
        tokens: int,
        hidden_dtype: int,
        reply_dtype: int,
        graph: int,
        layer: Sequence[tuple[int, int]],
    ) -> None:
        """Copy a captured graph, given where and how long the weights are that it was captured with."""


@torch.inference_mode()
def capture_graphs(
    executor: Executor, compute: Layer, weights: LayerWeights, device: torch.device
) -> list[torch.cuda.CUDAGraph]:
    """Capture every kind of batch with one layer's weights, for all layers of its shape.

    What is returned holds the memory of the kernels' temporaries: it must outlive the executor.
    """
    pool = torch.cuda.graph_pool_handle()
    tensors = (weights.up_gate, weights.up_gate_scales, weights.down, weights.down_scales)
    ranges = [(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors]
    graphs = []
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for bay, tokens, (hidden, reply) in product(range(executor.depth), executor.classes, KINDS):
            kind = (bay, tokens, CODES[hidden], CODES[reply])
            tensors_at = _Places(executor.places(*kind), device)
            batch = tensors_at.batch(tokens, executor.max_top_k, weights.down.shape[1], hidden)
            sums = tensors_at.tensor("sums", tuple(batch.hidden.shape), reply)
            pairs = tensors_at.tensor("pairs", (weights.num_experts,), torch.int32)
            batch.expert_ids.fill_(-1)
            compute.compute(weights, batch, sums, pairs)  # compiles: that cannot happen in a capture
            torch.cuda.current_stream(device).synchronize()
            # `torch.cuda.graph` would collect garbage each time.
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            compute.compute(weights, batch, sums, pairs)
            graph.capture_end()
            executor.add_graph(*kind, graph.raw_cuda_graph(), ranges)
            graphs.append(graph)
    return graphs


class _Places:
    """Device memory of the executor as tensors."""

    def __init__(self, addresses: Mapping[str, int], device: torch.device) -> None:
        self._addresses = addresses
        self._device = device

    def batch(self, tokens: int, slots: int, width: int, dtype: torch.dtype) -> TokenBatch:
        return TokenBatch(
            hidden=self.tensor("hidden", (tokens, width), dtype),
            scales=self.tensor("scales", (tokens, width // BLOCK), torch.float32) if dtype == FP8 else None,
            expert_ids=self.tensor("ids", (tokens, slots), torch.int32),
            weights=self.tensor("weights", (tokens, slots), torch.float32),
        )

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        memory = torch.as_tensor(_Memory(self._addresses[name], size), device=self._device)
        return memory.view(dtype).view(shape)


class _Memory:
    """Bytes at an address, by the protocol that `torch.as_tensor` reads."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
