"""What two servers on one machine cost each other by default: `python -m tests.system.neighbours`.

A small Qwen3-MoE model generates 32 tokens with its experts on two servers, the second started when the first serves:
once with defaults, once with `--threads 1`, in turns. Exit code 1 where the defaults are more than 1.5 times slower.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.integrations.huggingface import NAME, register
from expertd.client.tools.cluster import LocalCluster
from tests.support.families import write_family
from tests.support.generation import Model, load, prompts

TOKENS = 32
ROUNDS = 5
MOST = 1.5


async def main() -> int:
    taken: dict[str, list[float]] = {"defaults": [], "--threads 1": []}
    with tempfile.TemporaryDirectory() as folder:
        model = write_family(Path(folder), "qwen3_moe").quantized
        for _ in range(ROUNDS):
            taken["defaults"].append(await _generated(model, []))
            taken["--threads 1"].append(await _generated(model, ["--threads", "1"]))
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    for name, seconds in taken.items():
        print(f"{name:12} {medians[name] * 1e3:7.1f} ms  of {' '.join(f'{one * 1e3:.0f}' for one in seconds)}")
    ratio = medians["defaults"] / medians["--threads 1"]
    print(f"{ratio:.2f} times --threads 1, on {len(os.sched_getaffinity(0))} CPUs; at most {MOST}")
    return int(ratio > MOST)


async def _generated(model: Path, options: Sequence[str]) -> float:
    """Seconds for the tokens, the better of two."""
    async with contextlib.AsyncExitStack() as stack:
        addresses: list[str] = []
        for experts in ("0-7", "8-15"):
            # One after the other: the first is alone when it counts the servers here.
            cluster = LocalCluster(model, [experts], options)
            addresses += (await stack.enter_async_context(cluster)).addresses
        return await asyncio.to_thread(_fastest, model, addresses)


def _fastest(folder: Path, addresses: Sequence[str]) -> float:
    torch.set_num_threads(1)
    with register(addresses, CoordinatorConfig()):
        model = load(folder.parent / "plain", NAME)
        return min(_seconds(model) for _ in range(2))


@torch.inference_mode()
def _seconds(model: Model) -> float:
    started = time.perf_counter()
    model.generate(prompts(1), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
