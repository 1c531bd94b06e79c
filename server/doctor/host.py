"""Checks of this machine: driver, GPU, compiler, memory, ports, limits, shared memory."""

from __future__ import annotations

import importlib.metadata
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import expertd._native as native
from expertd.kernels.model.config import MoeConfig
from expertd.server.doctor.finding import Finding, fail, ok, warn
from expertd.server.options.config import Address, ServerConfig

LEAST_DRIVER = 580
"""The first branch that runs what cuTile compiles."""
LEAST_CAPABILITY = (8, 0)
FP8_CAPABILITY = (9, 0)
WORKSPACE_BYTES = 5_000_000_000
"""What a server needs on a GPU beside its weights, rounded up: batches of 16384 tokens at DeepSeek-V3's sizes."""
FEW_FILES = 4096
SMALL_SHARED_MEMORY = 16 << 20


def check_gpu(config: ServerConfig) -> Iterator[Finding]:
    """Driver, GPU and compiler, as far as --backend wants them."""
    if config.backend == "torch":
        yield ok("gpu", "not needed by --backend torch")
        return
    missing = fail if config.backend == "cutile" else warn
    consequence = "" if config.backend == "cutile" else "; --backend auto will compute on the CPU"
    driver = _driver_version()
    if driver is None:
        yield missing(
            "driver",
            f"nvidia-smi finds none: install NVIDIA's driver {LEAST_DRIVER} or newer; in a container also the NVIDIA"
            f" container toolkit and --gpus{consequence}",
        )
        return
    if int(driver.partition(".")[0]) < LEAST_DRIVER:
        yield fail("driver", f"{driver} is too old for cuTile's kernels: install {LEAST_DRIVER} or newer")
    else:
        yield ok("driver", driver)
    if not torch.cuda.is_available():
        yield missing(
            "gpu",
            f"torch {torch.__version__} sees no CUDA device: install its CUDA build, and look at CUDA_VISIBLE_DEVICES"
            f" and --gpus{consequence}",
        )
        return
    yield _judge_gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), config)
    yield check_compiler("sm_{}{}".format(*torch.cuda.get_device_capability()))


def _judge_gpu(name: str, capability: tuple[int, int], config: ServerConfig) -> Finding:
    shown = f"{name}, compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        return fail("gpu", f"{shown}: cuTile's kernels need 8.0 or newer; use another GPU, or --backend torch")
    if capability < FP8_CAPABILITY and config.pipeline == "fast":
        return fail("gpu", f"{shown} has no FP8: use --pipeline auto or dequant")
    if capability < FP8_CAPABILITY:
        return warn("gpu", f"{shown} has no FP8: the slower dequant pipeline will serve")
    return ok("gpu", shown)


def check_compiler(arch: str) -> Finding:
    """Compile one kernel for `arch` ("sm_90", ...), as serving will."""
    try:
        from expertd.kernels.cutile.pipeline.table import Table
        from expertd.kernels.cutile.tools.inspect import compile_kernel
        from expertd.kernels.cutile.tools.registry import shipped_launches

        started = time.perf_counter()
        launch = next(shipped_launches(arch, Table()))
        compile_kernel(launch.kernel, launch.args, arch)
    except Exception as error:
        # Whatever the compiler, its package or its dependencies raise: the reader needs the reason, not a traceback.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return fail("compiler", f"{reason}; install cuda-tile with its compiler: pip install 'expertd[server]'")
    version = importlib.metadata.version("cuda-tile")
    return ok("compiler", f"cuda-tile {version} compiled a kernel for {arch} in {time.perf_counter() - started:.1f} s")


def check_memory(config: ServerConfig, model: MoeConfig) -> Iterator[Finding]:
    """Room for the wanted layers and experts, on the GPU or in host memory, and for loading."""
    layers = len(config.layers or model.moe_layers)
    weights = layers * len(config.experts) * model.expert_bytes
    wanted = f"{layers} layers of {len(config.experts)} experts"
    relief = "own fewer --experts or --layers"
    on_gpu = config.backend != "torch" and torch.cuda.is_available()
    loading = 2 * len(config.experts) * model.expert_bytes
    if on_gpu:
        free, _ = torch.cuda.mem_get_info()
        yield _judge_memory("gpu memory", wanted, weights, WORKSPACE_BYTES, free, relief)
        yield _judge_memory("host memory", "two layers while loading", loading, 0, _available_memory(), relief)
    else:
        # The torch backend keeps FP32: four bytes for each one that is stored.
        yield _judge_memory("host memory", wanted, 4 * weights, loading, _available_memory(), relief)


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
        obstacle = _obstacle_to_bind(address)
        if obstacle is None:
            yield ok("ports", f"{option} {address} is free")
        else:
            yield fail("ports", f"{option} {address} cannot be bound, {obstacle}: see `ss -ltnp`, or change {option}")


def _obstacle_to_bind(address: Address) -> str | None:
    try:
        family, kind, protocol, _, resolved = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(resolved)
    except OSError as error:
        return error.strerror or str(error)
    return None


def check_native() -> Finding:
    return ok("native core", f"computes with {native.instruction_set()} on up to {native.pool_size()} threads")


def check_limits() -> Finding:
    """Open files: every connection is one. Pinned memory is CUDA's own and not counted by memlock, which is shown."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = f"open files {_limit(files)}, locked memory {_limit(locked)}"
    if 0 <= files < FEW_FILES:
        return warn("limits", f"{text}: raise open files with ulimit -n, LimitNOFILE= or --ulimit nofile=65536")
    return ok("limits", text)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return warn("shared memory", f"{folder} cannot be used, {error.strerror}: mount a tmpfs there")
    text = f"{free / 1e6:.0f} MB free in {folder}"
    if free < SMALL_SHARED_MEMORY:
        return warn("shared memory", f"{text}: give the container --shm-size=1g, or mount a larger tmpfs")
    return ok("shared memory", text)


def _driver_version() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if lines and lines[0].partition(".")[0].isdecimal() else None


def _available_memory(root: Path = Path("/")) -> int:
    """Bytes that a new program can have: what the machine has left, within the limit of the container."""
    fields = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (root / "sys/fs/cgroup/memory.max").read_text().strip()
        used = int((root / "sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - used)
