"""Checks of this machine: memory, ports, CPUs, limits, shared memory."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import expertd._native as native
from expertd.kernels.model.config import MoeConfig
from expertd.server.doctor.finding import Finding, fail, ok, warn
from expertd.server.options.config import ServerConfig
from expertd.server.options.ports import obstacle_to_bind
from expertd.server.scheduling.neighbours import CpuShare

WORKSPACE_BYTES = 5_000_000_000
"""What a server needs on a GPU beside its weights, rounded up: batches of 16384 tokens at DeepSeek-V3's sizes."""
FEW_FILES = 4096
SMALL_SHARED_MEMORY = 16 << 20


def check_memory(config: ServerConfig, model: MoeConfig, on_host: int, on_gpu: int | None) -> Iterator[Finding]:
    """Room for the wanted layers and experts in the free bytes of the GPU, or of the host, and for loading."""
    layers = len(config.layers or model.moe_layers)
    # BF16 takes twice as many bytes as FP8, nearly.
    expert_bytes = model.expert_bytes * (2 if config.weights == "bf16" else 1)
    weights = layers * len(config.experts) * expert_bytes
    wanted = f"{layers} layers of {len(config.experts)} experts"
    relief = "own fewer --experts or --layers"
    loading = 2 * len(config.experts) * expert_bytes
    if on_gpu is not None:
        yield _judge_memory("gpu memory", wanted, weights, WORKSPACE_BYTES, on_gpu, relief)
        yield _judge_memory("host memory", "two layers while loading", loading, 0, on_host, relief)
    else:
        # The torch backend keeps FP32: four bytes for each one of FP8.
        floats = 4 * layers * len(config.experts) * model.expert_bytes
        yield _judge_memory("host memory", wanted, floats, loading, on_host, relief)


def _judge_memory(check: str, wanted: str, needed: int, beside: int, free: int, relief: str) -> Finding:
    """`needed` bytes for `wanted` must be free, and `beside` more should be."""
    text = f"{wanted}: {needed / 1e9:.2f} GB of {free / 1e9:.2f} GB free"
    if needed > free:
        return fail(check, f"{text}: {relief}, or end what else uses it")
    if needed + beside > free:
        return warn(check, f"{text}, and about {beside / 1e9:.1f} GB beside them for batches or loading: {relief}")
    return ok(check, text)


def check_ports(config: ServerConfig) -> Iterator[Finding]:
    for option, address in (("--listen", config.listen), ("--metrics", config.metrics)):
        obstacle = obstacle_to_bind(address)
        if obstacle is None:
            yield ok("ports", f"{option} {address} is free")
        else:
            yield fail("ports", f"{option} {address} cannot be bound, {obstacle}: see `ss -ltnp`, or change {option}")


def check_native() -> Finding:
    return ok("native core", f"computes with {native.instruction_set()} on up to {native.pool_size()} threads")


def check_cpus(share: CpuShare) -> Finding:
    """Whether the torch backend's threads have CPUs, beside those of servers that run here already."""
    if share.crowded:
        return warn("limits", f"{share}: more threads than CPUs; leave --threads away, or give fewer")
    if share.others and os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        return warn("limits", f"{share}: OMP_WAIT_POLICY=ACTIVE has waiting threads keep CPUs from others; unset it")
    return ok("limits", str(share))


def check_limits() -> Finding:
    """Open files: every connection is one, and a server allows itself as many as it may. Pinned memory is CUDA's own
    and not counted by memlock, which is shown."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = f"open files {_limit(files)}, locked memory {_limit(locked)}"
    if 0 <= files <= FEW_FILES:
        return warn("limits", f"{text}: raise open files with ulimit -n, LimitNOFILE= or --ulimit nofile=65536")
    return ok("limits", text)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def check_shared_memory(folder: Path = Path("/dev/shm"), least: int = SMALL_SHARED_MEMORY) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return warn("shared memory", f"{folder} cannot be used, {error.strerror}: mount a tmpfs there")
    text = f"{free / 1e6:.0f} MB free in {folder}"
    if free < least:
        return warn("shared memory", f"{text}: give the container --shm-size=1g, or mount a larger tmpfs")
    return ok("shared memory", text)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that a new program can have: what the machine has left, within the limit of the container."""
    fields = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (root / "sys/fs/cgroup/memory.max").read_text().strip()
        used = int((root / "sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - used)
