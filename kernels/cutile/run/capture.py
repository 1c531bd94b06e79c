"""Graphs of a layer's kernels for the native executor, which launches them with any layer's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertd.kernels.cutile.pipeline.arithmetic import STEP_TOKENS, Layer
from expertd.kernels.model.config import BLOCK
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import FP8

if TYPE_CHECKING:
    from expertd._native import CudaExecutor

CODES = {FP8: 1, torch.bfloat16: 2, torch.float32: 3}
"""Of `DType` in proto/expert_shard.proto."""
DTYPES = tuple(product((FP8, torch.bfloat16), (torch.bfloat16, torch.float32)))
"""Of hidden states and replies."""


class Graphs:
    """The graphs that an executor was given, by size class and dtypes."""

    def __init__(self, executor: CudaExecutor, compute: Layer, express: Layer, device: torch.device) -> None:
        """`express` computes the classes that may run at the same time as one of the others."""
        self._executor = executor
        self._device = device
        # Others run one after another, so that they have their temporaries in the same memory: the largest go first.
        self._express, self._other = ((layer, torch.cuda.graph_pool_handle()) for layer in (express, compute))
        # The executor has copies; these hold the memory.
        self._captured: dict[tuple[int, torch.dtype, torch.dtype], list[torch.cuda.CUDAGraph]] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def layer_for(self, tokens: int) -> Layer:
        """What computes a size class."""
        return self._way(tokens)[0]

    def capture_all(self, weights: LayerWeights) -> None:
        for tokens, (hidden, reply) in product(reversed(self._executor.classes), DTYPES):
            self.capture(weights, tokens, hidden, reply)

    def capture(self, weights: LayerWeights, tokens: int, hidden: torch.dtype, reply: torch.dtype) -> None:
        """Capture the graphs of a size class, unless that was done before, with any layer's weights.

        Waits for all batches that are under way: the kernels' memory is theirs.
        """
        key = (tokens, hidden, reply)
        if key in self._captured:
            return
        self._executor.drain()
        torch.cuda.synchronize(self._device)
        kind = (tokens, CODES[hidden], CODES[reply])
        with torch.cuda.stream(torch.cuda.Stream(self._device)), torch.inference_mode():
            ways = self._capture(weights, _Places(self._executor.places(0, *kind), self._device), *key)
        ranges = [(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in weights.tensors]
        for graphs in ways:
            self._executor.add_graphs(*kind, graphs=[graph.raw_cuda_graph() for graph in graphs], layer=ranges)
        self._captured[key] = [graph for graphs in ways for graph in graphs]

    def _capture(
        self, weights: LayerWeights, places: _Places, tokens: int, hidden: torch.dtype, reply: torch.dtype
    ) -> list[list[torch.cuda.CUDAGraph]]:
        """The graph of the class and, of the largest ones, those of its steps."""
        batch = places.batch(tokens, self._executor.max_top_k, weights.down.shape[1], hidden)
        sums = places.tensor("sums", tuple(batch.hidden.shape), reply)
        pairs = places.tensor("pairs", (weights.num_experts,), torch.int32)
        batch.expert_ids.fill_(-1)
        layer, pool = self._way(tokens)
        ways: list[Sequence[Callable[[], None]]] = [[partial(layer.compute, weights, batch, sums, pairs)]]
        if tokens >= STEP_TOKENS and len(steps := layer.steps(weights, batch, sums, pairs)) > 1:
            ways.append(steps)
        for way in ways:
            for work in way:
                work()  # compiles: that cannot happen in a capture
        torch.cuda.current_stream(self._device).synchronize()
        torch.cuda.empty_cache()  # what that took, the capture takes from the graphs' memory
        return [[captured(work, pool) for work in way] for way in ways]

    def _way(self, tokens: int) -> tuple[Layer, Any]:
        return self._express if tokens <= self._executor.express_rows else self._other


def captured(work: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:  # noqa: ANN401
    """`work` on the current stream as a graph, whose temporaries are in the memory of `pool`, or of its own."""
    # `torch.cuda.graph` would collect garbage each time.
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    work()
    graph.capture_end()
    return graph


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
