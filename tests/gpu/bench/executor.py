"""What the kernels compute without the executor, and how long batches take through it.

python -m tests.gpu.bench.executor    medians with DeepSeek-V3's shape: microseconds
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor

from expertd._native import CudaExecutor
from expertd.kernels.cutile.base.shape import SHAPE_CLASSES, ExpertShape
from expertd.kernels.cutile.pipeline.arithmetic import Pipeline
from expertd.kernels.cutile.run.backend import EXPRESS_ROWS, CutileBackend
from expertd.kernels.cutile.run.batch import start_batch
from expertd.kernels.cutile.run.capture import CODES, DTYPES, Graphs
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.numerics.backend import Computed, DeviceSeconds, TokenBatch

CPU, DEVICE = torch.device("cpu"), torch.device("cuda:0")
LAYERS = 4


def loaded(
    folder: Path,
    shape: ExpertShape,
    layers: int,
    max_batch_tokens: int,
    *,
    max_tokens: int = SHAPE_CLASSES[-1],
    pipeline: Pipeline = "fast",
) -> CutileBackend:
    """A backend with all graphs captured."""
    backend = CutileBackend(
        pipeline, max_batch_tokens=max_batch_tokens, max_tokens=max_tokens, cache=folder / "tune.json"
    )
    for layer in range(layers):
        backend.load_layer(layer, random_weights(shape, DEVICE))
    began = time.perf_counter()
    backend.warm_up()
    print(f"{len(backend._graphs)} graphs captured in {time.perf_counter() - began:.1f} s")
    return backend


@torch.inference_mode()
def eager(backend: CutileBackend, layer: int, batches: Sequence[TokenBatch], reply: torch.dtype) -> Computed:
    """The results of kernels that are launched one by one on unpadded tensors, in the parts that the executor makes."""
    weights, width = backend._layers[layer], backend._shape.hidden_size
    hidden = torch.cat([batch.hidden.to(DEVICE) for batch in batches])
    scales = [batch.scales.to(DEVICE) for batch in batches if batch.scales is not None]
    joined = TokenBatch(
        hidden,
        torch.cat(scales) if scales else None,
        torch.cat([batch.expert_ids.to(DEVICE) for batch in batches]),
        torch.cat([batch.weights.to(DEVICE) for batch in batches]),
    )
    tokens = joined.num_tokens
    sums = torch.full((tokens, width), torch.nan, dtype=reply, device=DEVICE)
    pairs = torch.zeros(weights.num_experts, dtype=torch.int32, device=DEVICE)
    on_host = not all(batch.hidden.is_cuda for batch in batches)
    _, size, padded = backend.native_executor().cut(tokens, on_host=on_host)
    compute = backend._graphs.layer_for(padded)
    for first in range(0, tokens, size):
        rows = slice(first, first + size)
        counted = torch.empty_like(pairs)
        compute.compute(weights, _rows(joined, rows), sums[rows], counted)
        pairs += counted
    torch.cuda.synchronize()
    parts = sums.cpu().split([batch.num_tokens for batch in batches])
    return Computed(parts, pairs.cpu(), DeviceSeconds(0, 0, 0))


def _rows(batch: TokenBatch, rows: slice) -> TokenBatch:
    scales = None if batch.scales is None else batch.scales[rows]
    return TokenBatch(batch.hidden[rows], scales, batch.expert_ids[rows], batch.weights[rows])


def poison(backend: CutileBackend) -> None:
    """Fill the bays' device memory with NaN; the ids of padding are the executor's to write."""
    executor, columns = backend.native_executor(), backend._shape.hidden_size
    for bay in range(executor.depth):
        for tokens in executor.classes:
            for hidden, reply in DTYPES:
                places = executor.places(bay, tokens, CODES[hidden], CODES[reply])
                _fill(places["sums"], tokens * columns * reply.itemsize)
                _fill(places["hidden"], tokens * columns * hidden.itemsize)
    torch.cuda.synchronize()


class _Bytes:
    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _fill(address: int, size: int) -> None:
    torch.as_tensor(_Bytes(address, size), device=DEVICE).fill_(0xFF)


def placed(batch: TokenBatch, where: str, reply: torch.dtype) -> TokenBatch:
    """A host batch whose rows, and the place of whose sums, are "pageable", "pinned" or on the "device"."""
    if where == "device":
        scales = None if batch.scales is None else batch.scales.to(DEVICE)
        room: Tensor = torch.full(batch.hidden.shape, torch.nan, dtype=reply, device=DEVICE)
        moved = replace(batch, hidden=batch.hidden.to(DEVICE), scales=scales, reply=room)
        torch.cuda.synchronize()
        return moved
    room = torch.full(batch.hidden.shape, torch.nan, dtype=reply)
    if where == "pinned":
        return replace(batch, hidden=batch.hidden.pin_memory(), reply=room.pin_memory())
    return replace(batch, reply=room)


def median(work: Callable[[], float], repeats: int) -> float:
    """Of seconds that `work` says it took, in microseconds."""
    for _ in range(10):
        work()
    return statistics.median(work() for _ in range(repeats)) * 1e6


def time_batch(
    backend: CutileBackend, executor: CudaExecutor, batches: Sequence[TokenBatch], repeats: int
) -> tuple[float, tuple[float, ...]]:
    """Microseconds of a batch from its start to when its end is seen, and the stages of the last one."""
    turn, stages = 0, (0.0, 0.0, 0.0)

    def work() -> float:
        nonlocal turn, stages
        turn += 1
        batch = start_batch(executor, backend._layers[turn % LAYERS].addresses, batches, torch.bfloat16)
        executor.wait(batch.native)
        stages = batch.native.seconds
        return batch.native.elapsed

    return median(work, repeats), tuple(seconds * 1e6 for seconds in stages)


def two_under_way(backend: CutileBackend, batches: Sequence[TokenBatch], count: int) -> float:
    """Microseconds a batch when the next one starts while one is under way."""
    began = time.perf_counter()
    before = backend.submit(0, batches[:1], torch.bfloat16)
    for turn in range(1, count):
        after = backend.submit(turn % LAYERS, [batches[turn % 2]], torch.bfloat16)
        before.result()
        before = after
    before.result()
    return (time.perf_counter() - began) / count * 1e6


def other_executor(backend: CutileBackend, **options: int) -> tuple[CudaExecutor, Graphs]:
    """One with other options, for the same layers, and its graphs, which must live as long."""
    shape = backend._shape
    executor = CudaExecutor(
        0,
        depth=2,
        hidden_size=shape.hidden_size,
        num_experts=shape.num_experts,
        max_top_k=8,
        classes=SHAPE_CLASSES,
        max_tokens=SHAPE_CLASSES[-1],
        express_rows=EXPRESS_ROWS,
        **options,
    )
    layer_for = backend._graphs.layer_for
    graphs = Graphs(executor, layer_for(SHAPE_CLASSES[-1]), layer_for(SHAPE_CLASSES[0]), DEVICE)
    for tokens in SHAPE_CLASSES:
        graphs.capture(backend._layers[0], tokens, torch.float8_e4m3fn, torch.bfloat16)
    return executor, graphs


def measure() -> None:
    backend = loaded(Path(mkdtemp()), ExpertShape(), LAYERS, SHAPE_CLASSES[-1])
    print(torch.cuda.get_device_name())
    executor = backend.native_executor()
    for tokens, repeats in (
        (1, 1000),
        (8, 500),
        (64, 500),
        (256, 200),
        (1024, 100),
        (4096, 50),
        (8192, 30),
        (16384, 30),
    ):
        batch = random_batch(ExpertShape(), tokens, CPU)
        for where in ("pageable", "pinned", "device"):
            taken, stages = time_batch(backend, executor, [placed(batch, where, torch.bfloat16)], repeats)
            shown = " ".join(f"{stage:.1f}" for stage in stages)
            print(f"{tokens:6} tokens {where:8} {taken:9.1f} us   in, compute, out {shown}")
    for where in ("pageable", "pinned", "device"):
        requests = [placed(random_batch(ExpertShape(), 16384, CPU), where, torch.bfloat16) for _ in range(2)]
        print(f" 16384 tokens {where:8} two under way: {two_under_way(backend, requests, 20):9.1f} us a batch")
    merged = [placed(random_batch(ExpertShape(), 1, CPU), "pinned", torch.bfloat16) for _ in range(64)]
    print(f"64 requests of 1 token: {time_batch(backend, executor, merged, 300)[0]:.1f} us")


def compare(overlaps: Sequence[int] = (2048, 4096, 8192, 16384)) -> None:
    """Large batches in parts of several sizes; small ones with every batch timed and every eighth."""
    backend = loaded(Path(mkdtemp()), ExpertShape(), LAYERS, SHAPE_CLASSES[-1])
    for overlap in overlaps:
        executor, graphs = other_executor(backend, overlap_tokens=overlap)
        for tokens in (4096, 8192, 16384):
            request = placed(random_batch(ExpertShape(), tokens, CPU), "pinned", torch.bfloat16)
            taken, stages = time_batch(backend, executor, [request], 20)
            shown = " ".join(f"{stage:.1f}" for stage in stages)
            print(f"{tokens:6} tokens pinned, parts of {overlap:5}: {taken:9.1f} us   in, compute, out {shown}")
        del executor, graphs
    for time_every in (1, 8):
        executor, graphs = other_executor(backend, time_every=time_every)
        for tokens in (1, 64):
            request = placed(random_batch(ExpertShape(), tokens, CPU), "pinned", torch.bfloat16)
            taken, _ = time_batch(backend, executor, [request], 1000)
            print(f"{tokens:6} tokens, one of {time_every} timed: {taken:9.1f} us")
        del executor, graphs


if __name__ == "__main__":
    measure()
    compare()
