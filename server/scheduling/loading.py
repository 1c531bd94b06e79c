"""From checkpoint to device: every layer read, loaded and checked, with progress for the person who waits."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from expertd._native import Failpoints
from expertd.kernels.model.ranges import format_ranges
from expertd.kernels.numerics.backend import LayerWeights
from expertd.kernels.numerics.quantize import FP8
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import ExpertMatrices, layer_bytes, load_layer, read_expert, stored_dtypes
from expertd.kernels.weights.ledger import Ledger
from expertd.server.scheduling.node import Node
from expertd.server.scheduling.shard import Shard
from expertd.server.telemetry.metrics import Metrics, adding_seconds

log = logging.getLogger(__name__)
PROGRESS_SECONDS = 2.0
"""Between two lines of the log."""
ROUNDED = (
    "the checkpoint's weights are BF16 and are rounded to FP8 in blocks of 128x128, an error of 2.6e-2: the model may"
    " choose other tokens; --weights bf16 serves them as they are, in twice the memory"
)
CONVERTED = (
    "the checkpoint's weights are MXFP4 and are converted to FP8 in blocks of 128x128: what is not exact is told"
)
CHECKED_EXPERTS = 2
"""Of each layer, in the self-check, or one of each device if that is more; reading one again takes about 0.1 s at
DeepSeek-V3's sizes."""


async def load_layers(
    checkpoint: Checkpoint,
    ledger: Ledger,
    shard: Shard,
    node: Node,
    metrics: Metrics,
    failpoints: Failpoints | None = None,
) -> tuple[torch.dtype, ...]:
    """Load and check all layers of `shard`; what the files hold their weights as. All headers are checked before the
    first weight is read; `ledger` decides whether what was read may be used.

    Raises `CheckpointError` or `SelfCheckFailed`.
    """
    total = sum(layer_bytes(checkpoint, layer, experts, shard.weight_dtype) for layer, experts in shard.experts.items())
    log.info(
        "loading layers %s, experts %s of %s: %.2f GB",
        format_ranges(shard.layers),
        format_ranges(sorted(set().union(*shard.experts.values()))),
        checkpoint.folder,
        total / 1e9,
    )
    stored = stored_dtypes(checkpoint, shard.experts)
    if shard.weight_dtype == FP8 and torch.bfloat16 in stored:
        log.warning(ROUNDED)
    if torch.float4_e2m1fn_x2 in stored:
        log.info(CONVERTED)
    started = time.perf_counter()
    told, worst = started, 0.0
    with _progress_bar() as bar:
        task = bar.add_task("weights", total=total)

        def read(layer: int) -> asyncio.Future[LayerWeights]:
            advance = partial(bar.advance, task)
            return asyncio.ensure_future(
                asyncio.to_thread(
                    load_layer, checkpoint, layer, shard.experts[layer], advance, ledger.settle, shard.weight_dtype
                )
            )

        reading = read(shard.layers[0])
        for layer, following in zip(shard.layers, (*shard.layers[1:], None), strict=True):
            with adding_seconds(metrics.startup.labels("read")):
                weights = await reading
            if following is not None:
                # The disk and the device work at once, with two layers in host memory.
                reading = read(following)
            bar.update(task, description=f"layer {layer}")
            if failpoints is not None and failpoints.strikes("slow_loading"):
                await asyncio.sleep(failpoints.seconds("slow_loading"))
            with adding_seconds(metrics.startup.labels("load")):
                held = node.assign(layer, shard.experts[layer])
                _, sample = await asyncio.gather(
                    node.load(layer, shard.experts[layer], weights),
                    asyncio.to_thread(read_again, checkpoint, layer, held, shard.weight_dtype),
                )
            with adding_seconds(metrics.startup.labels("self_check")):
                error = await node.check(layer, sample)
            worst = max(worst, error)
            metrics.layers_loaded.inc()
            log.debug("layer %d: self-check error %.2e", layer, error)
            if time.perf_counter() > told + PROGRESS_SECONDS:
                told = time.perf_counter()
                done = shard.layers.index(layer) + 1
                log.info("loaded %d of %d layers in %.0f s", done, len(shard.layers), told - started)
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
    with adding_seconds(metrics.startup.labels("warm_up")), Console(stderr=True).status("warming up"):
        await node.warm_up()
    log.info("warmed up in %.1f s", time.perf_counter() - started)
    return stored


def read_again(
    checkpoint: Checkpoint, layer: int, shares: Sequence[Sequence[int]], dtype: torch.dtype
) -> dict[int, ExpertMatrices]:
    """A few experts of a layer, of each device's share: other ones every time, by the way that loading does not."""
    count = max(1, CHECKED_EXPERTS // len(shares))
    chosen = {expert for share in shares for expert in random.sample(share, min(count, len(share)))}
    return {expert: read_expert(checkpoint, layer, expert, dtype) for expert in sorted(chosen)}


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
