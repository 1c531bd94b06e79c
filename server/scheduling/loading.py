"""From checkpoint to device: every layer read, loaded and checked, with progress for the person who waits."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from expertd.kernels.model.ranges import format_ranges
from expertd.kernels.numerics.backend import Backend, LayerWeights
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import ExpertMatrices, layer_bytes, load_layer, read_expert
from expertd.kernels.weights.ledger import Ledger
from expertd.server.scheduling.device import DeviceOwner
from expertd.server.scheduling.selfcheck import self_check
from expertd.server.scheduling.shard import Shard
from expertd.server.telemetry.metrics import Metrics, adding_seconds

log = logging.getLogger(__name__)
CHECKED_EXPERTS = 2
"""Of each layer, in the self-check; reading one again takes about 0.1 s at DeepSeek-V3's sizes."""


async def load_layers(
    checkpoint: Checkpoint, ledger: Ledger, shard: Shard, backend: Backend, device: DeviceOwner, metrics: Metrics
) -> None:
    """Load and check all layers of `shard`. All headers are checked before the first weight is read; `ledger` decides
    whether what was read may be used.

    Raises `CheckpointError` or `SelfCheckFailed`.
    """
    total = sum(layer_bytes(checkpoint, layer, shard.experts) for layer in shard.layers)
    log.info(
        "loading layers %s, experts %s of %s: %.2f GB",
        format_ranges(shard.layers),
        format_ranges(shard.experts),
        checkpoint.folder,
        total / 1e9,
    )
    started = time.perf_counter()
    worst = 0.0
    with _progress_bar() as bar:
        task = bar.add_task("weights", total=total)

        def read(layer: int) -> asyncio.Future[LayerWeights]:
            advance = partial(bar.advance, task)
            return asyncio.ensure_future(
                asyncio.to_thread(load_layer, checkpoint, layer, shard.experts, advance, ledger.settle)
            )

        reading = read(shard.layers[0])
        for layer, following in zip(shard.layers, (*shard.layers[1:], None), strict=True):
            with adding_seconds(metrics.startup.labels("read")):
                weights = await reading
            if following is not None:
                # The disk and the device work at once, with two layers in host memory.
                reading = read(following)
            bar.update(task, description=f"layer {layer}")
            with adding_seconds(metrics.startup.labels("load")):
                _, sample = await asyncio.gather(
                    device.call(partial(backend.load_layer, layer, weights)),
                    asyncio.to_thread(_read_again, checkpoint, layer, shard.experts),
                )
            with adding_seconds(metrics.startup.labels("self_check")):
                error = await device.call(partial(self_check, backend, layer, sample))
            worst = max(worst, error)
            metrics.weights_bytes.inc(weights.num_bytes)
            metrics.layers_loaded.inc()
            log.debug("layer %d: self-check error %.2e", layer, error)
    await asyncio.to_thread(ledger.save)
    seconds = time.perf_counter() - started
    log.info(
        "loaded and checked %d layers in %.1f s, %.2f GB/s, worst self-check error %.1e",
        len(shard.layers),
        seconds,
        total / 1e9 / seconds,
        worst,
    )
    started = time.perf_counter()
    with adding_seconds(metrics.startup.labels("warm_up")):
        await device.call(backend.warm_up)
    log.info("warmed up in %.1f s", time.perf_counter() - started)


def _read_again(checkpoint: Checkpoint, layer: int, experts: Sequence[int]) -> dict[int, ExpertMatrices]:
    """A few experts of a layer by their local ids, other ones at every start, by the way that loading does not take."""
    chosen = random.sample(range(len(experts)), min(CHECKED_EXPERTS, len(experts)))
    return {local: read_expert(checkpoint, layer, experts[local]) for local in chosen}


def _progress_bar() -> Progress:
    """A bar on a terminal, nothing in a log file: the log has its own lines."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        disable=not sys.stderr.isatty(),
    )
