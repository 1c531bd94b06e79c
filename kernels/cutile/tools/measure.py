"""Device time, as a server with captured graphs would see it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from expertd.kernels.cutile.base.launch import Launch

L2_BYTES = 256 << 20
"""More than any GPU's L2 cache."""


def device_time(work: Callable[[], object], repeats: int = 10) -> float:
    """Median microseconds of `work`, replayed as a CUDA graph with a cold L2 cache. It must not wait for the device."""
    flushed = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    return graph_time(work, repeats, before=flushed.zero_)


def graph_time(work: Callable[[], object], repeats: int = 11, before: Callable[[], object] = lambda: None) -> float:
    """Median microseconds of replaying `work` as a CUDA graph, with `before` called ahead of every replay."""
    work()  # compiles, and allocates what the libraries keep
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    spans = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats + 2)]
    for start, end in spans:
        before()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in spans[2:])) * 1000


def kernel_times(launches: Sequence[Launch]) -> dict[str, float]:
    """Microseconds that each kernel of a pipeline takes, all its launches together, in the pipeline's order."""
    for launch in launches:  # in order, so that each kernel finds the inputs that the others leave
        launch()
    times: dict[str, float] = defaultdict(float)
    for launch in launches:
        times[launch.name] += device_time(launch)
    return dict(times)
