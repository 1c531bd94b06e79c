"""The native executor beside the Python backend, on one GPU and with the same weights.

python -m tests.gpu.native_gpu FOLDER    medians of both, with DeepSeek-V3's shape: microseconds
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertd.kernels.cutile.base.shape import SHAPE_CLASSES, ExpertShape
from expertd.kernels.cutile.pipeline.arithmetic import Pipeline
from expertd.kernels.cutile.run.backend import CutileBackend
from expertd.kernels.cutile.run.capture import CODES, KINDS, capture_graphs
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from tests.support.native_build import build_cuda_extension

MAX_TOP_K = 8
DEVICE = torch.device("cuda:0")


@dataclass(frozen=True)
class Job:
    """A batch on its way, and all that its memory belongs to."""

    native: Any
    batches: Sequence[TokenBatch]
    sums: list[Tensor]

    @property
    def pairs(self) -> Tensor:
        return torch.tensor(self.native.pairs, dtype=torch.int32)


class NativeRig:
    """An executor with graphs of every kind, and the backend whose weights and kernels they use."""

    def __init__(
        self,
        folder: Path,
        shape: ExpertShape,
        layers: int,
        max_batch_tokens: int,
        *,
        max_tokens: int = SHAPE_CLASSES[-1],
        pipeline: Pipeline = "fast",
        time_every: int = 1,
    ) -> None:
        self._extension = build_cuda_extension(folder, "-O2")
        self.backend = CutileBackend(
            pipeline, max_batch_tokens=max_batch_tokens, max_tokens=max_tokens, cache=folder / "tune.json"
        )
        for layer in range(layers):
            self.backend.load_layer(layer, random_weights(shape, DEVICE))
        self.classes = [tokens for tokens in SHAPE_CLASSES if tokens <= max_batch_tokens]
        sizes = (shape.hidden_size, shape.num_experts, MAX_TOP_K)
        self.native = self._extension.Rig("libcuda.so.1", 0, 2, sizes, self.classes, time_every)
        began = time.perf_counter()
        weights = self.backend._layers[0]
        self._graphs = capture_graphs(self.native.executor, self.backend._compute, weights, DEVICE)
        print(f"{len(self._graphs)} graphs captured in {time.perf_counter() - began:.1f} s")

    def close(self) -> None:
        self.native.close()

    def poison(self) -> None:
        """Fill the bays' device memory with NaN; the ids of padding are the executor's to write."""
        for bay in range(2):
            for tokens in self.classes:
                for hidden, reply in KINDS:
                    places = self.native.executor.places(bay, tokens, CODES[hidden], CODES[reply])
                    columns = self.backend._shape.hidden_size
                    _fill(places["sums"], tokens * columns * reply.itemsize)
                    _fill(places["hidden"], tokens * columns * hidden.itemsize)
        torch.cuda.synchronize()

    def start(self, layer: int, batches: Sequence[TokenBatch], reply: torch.dtype, *, pinned: bool = False) -> Job:
        job = self.job(layer, batches, reply, pinned=pinned)
        self.native.start(job.native, time.monotonic_ns())
        return job

    def job(self, layer: int, batches: Sequence[TokenBatch], reply: torch.dtype, *, pinned: bool = False) -> Job:
        if pinned:
            batches = [_pinned(batch) for batch in batches]
        sums = [torch.full(batch.hidden.shape, torch.nan, dtype=reply) for batch in batches]
        sums = [tensor.pin_memory() for tensor in sums] if pinned else sums
        parts = [
            (
                batch.hidden.data_ptr(),
                0 if batch.scales is None else batch.scales.data_ptr(),
                batch.expert_ids.data_ptr(),
                batch.weights.data_ptr(),
                out.data_ptr(),
                batch.num_tokens,
                pinned,
            )
            for batch, out in zip(batches, sums, strict=True)
        ]
        first = batches[0]
        codes = (CODES[first.hidden.dtype], CODES[reply], first.expert_ids.shape[1])
        native = self._extension.Job(*codes, parts, addresses(self.backend._layers[layer]), (batches, sums))
        return Job(native, batches, sums)

    def wait(self, jobs: Sequence[Job]) -> None:
        """Until all of `jobs`, which alone are under way, are back. Raises what the device met."""
        back = 0
        while back < len(jobs):
            back += self.native.poll(time.monotonic_ns()) is not None
        for job in jobs:
            if job.native.error:
                raise RuntimeError(job.native.error)

    def compute(
        self, layer: int, batches: Sequence[TokenBatch], reply: torch.dtype, *, pinned: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        job = self.start(layer, batches, reply, pinned=pinned)
        self.wait([job])
        return job.sums, job.pairs


def addresses(weights: LayerWeights) -> list[int]:
    tensors = (weights.up_gate, weights.up_gate_scales, weights.down, weights.down_scales)
    return [tensor.data_ptr() for tensor in tensors]


class _Bytes:
    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _fill(address: int, size: int) -> None:
    torch.as_tensor(_Bytes(address, size), device=DEVICE).fill_(0xFF)


def _pinned(batch: TokenBatch) -> TokenBatch:
    return TokenBatch(batch.hidden.pin_memory(), batch.scales, batch.expert_ids, batch.weights)


def median(work: Callable[[], float], repeats: int) -> float:
    """Of seconds that `work` says it took, in microseconds."""
    for _ in range(10):
        work()
    return statistics.median(work() for _ in range(repeats)) * 1e6


def measure(folder: Path) -> None:
    shape, layers = ExpertShape(), 4
    for time_every in (1, 8):
        rig = NativeRig(folder, shape, layers, SHAPE_CLASSES[-1], time_every=time_every)
        print(f"{torch.cuda.get_device_name()}, one small batch of {time_every} timed")
        for tokens, pinned, repeats in ((1, False, 1000), (64, False, 500), (64, True, 500), (16384, True, 20)):
            batch = random_batch(shape, tokens, torch.device("cpu"))
            placed = _pinned(batch) if pinned else batch
            jobs = [rig.job(layer, [placed], torch.bfloat16, pinned=pinned) for layer in range(layers)]
            turn = 0

            def native(jobs: Sequence[Job] = jobs, rig: NativeRig = rig) -> float:
                nonlocal turn
                turn += 1
                return float(rig.native.compute(jobs[turn % layers].native))

            def python(placed: TokenBatch = placed, rig: NativeRig = rig) -> float:
                nonlocal turn
                turn += 1
                began = time.perf_counter()
                rig.backend.submit(turn % layers, [placed], torch.bfloat16).result()
                return time.perf_counter() - began

            times = f"native {median(native, repeats):9.1f}  python {median(python, repeats):9.1f} us"
            stages = " ".join(f"{seconds * 1e6:.1f}" for seconds in jobs[0].native.timings)
            print(f"{tokens:6} tokens{' pinned' if pinned else '       '}  {times}   in, compute, out {stages}")
            if jobs[0].native.error:
                raise RuntimeError(jobs[0].native.error)
        rig.close()
        del rig, jobs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
