"""Checks of this machine's GPU, its driver and its compiler."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from expertd.kernels.memory.gpu import gpu_uuid
from expertd.server.doctor.finding import Finding, fail, ok, warn
from expertd.server.hardware.gpu_health import GpuHealth
from expertd.server.hardware.nvml import Nvml, load_nvml
from expertd.server.options.config import ServerConfig

LEAST_DRIVER = 580
"""The first branch that runs what cuTile compiles."""
SLOWDOWNS = ("hardware_slowdown", "thermal_software", "thermal_hardware", "power_brake")
MOST_ADDED = 8
"""GPUs whose sums are added up on them."""
LEAST_CAPABILITY, FP8_CAPABILITY = (8, 0), (9, 0)


def driver_version() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if lines and lines[0].partition(".")[0].isdecimal() else None


def check_gpu(config: ServerConfig, find_driver: Callable[[], str | None] = driver_version) -> Iterator[Finding]:
    """Driver, GPU and compiler, as far as --backend wants them."""
    if config.backend == "torch":
        yield ok("gpu", "not needed by --backend torch")
        return
    missing = fail if config.backend == "cutile" else warn
    consequence = "" if config.backend == "cutile" else "; --backend auto will compute on the CPU"
    if (driver := find_driver()) is None:
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
    devices = devices_of(config, torch.cuda.device_count())
    if config.devices is not None:
        yield check_devices(devices, torch.cuda.device_count(), torch.cuda.can_device_access_peer)
    for device in devices:
        capability = torch.cuda.get_device_capability(device)
        yield _judge_gpu(torch.cuda.get_device_name(device), capability, config)
        yield from check_health(gpu_uuid(torch.device("cuda", device)), load_nvml())
    yield check_compiler("sm_{}{}".format(*torch.cuda.get_device_capability()))


def devices_of(config: ServerConfig, there: int) -> tuple[int, ...]:
    """Those of the GPUs here that a server would use."""
    if config.devices is None:
        return (torch.cuda.current_device(),)
    return tuple(device for device in config.devices or range(there) if device < there)


def check_devices(devices: Sequence[int], there: int, reaches: Callable[[int, int], bool]) -> Finding:
    """How `devices` that are one server add up what each has of a batch."""
    if not devices:
        return fail("devices", f"--devices names none of the {there} GPUs that torch sees")
    apart = [(a, b) for a in devices for b in devices if a != b and not reaches(a, b)]
    if apart:
        return warn(
            "devices",
            f"GPU {apart[0][0]} does not reach the memory of GPU {apart[0][1]}: sums are added up on the host, which"
            " takes many times as long for large batches; see `nvidia-smi topo -p2p rw`",
        )
    if len(devices) > MOST_ADDED:
        return warn("devices", f"{len(devices)} GPUs: sums of more than {MOST_ADDED} are added up on the host")
    return ok("devices", f"{len(devices)} GPUs, each of which reaches the memory of the others: they add up their sums")


def _judge_gpu(name: str, capability: tuple[int, int], config: ServerConfig) -> Finding:
    shown = f"{name}, compute capability {capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        return fail("gpu", f"{shown}: cuTile's kernels need 8.0 or newer; use another GPU, or --backend torch")
    if capability < FP8_CAPABILITY and config.pipeline == "fast":
        return fail("gpu", f"{shown} has no FP8: use --pipeline auto or dequant")
    if capability < FP8_CAPABILITY:
        return warn("gpu", f"{shown} has no FP8: the slower dequant pipeline will serve")
    return ok("gpu", shown)


def check_health(uuid: str, nvml: Nvml | None) -> Iterator[Finding]:
    """What NVML tells of the GPU."""
    if nvml is None:
        yield warn("gpu health", "nobody will see it: install NVML's bindings: pip install 'expertd[server]'")
        return
    if (health := GpuHealth.open(nvml, uuid)) is None:
        yield warn("gpu health", "NVML does not know this GPU; metrics will lack it")
        return
    reading = health.read()
    health.close()
    hot = [reason for reason in SLOWDOWNS if reading.throttling.get(reason)]
    if reading.ecc_errors.get("uncorrected"):
        yield warn("gpu health", f"{reading}: reset the GPU; replace it if they come again")
    elif hot:
        yield warn("gpu health", f"{reading}: it computes slowly; look at its cooling and power")
    else:
        yield ok("gpu health", str(reading))


def check_compiler(arch: str) -> Finding:
    """Compile one kernel for `arch` ("sm_90", ...), as serving will."""
    try:
        from expertd.kernels.cutile.pipeline.table import Table
        from expertd.kernels.cutile.pipeline.toolchain import Toolchain
        from expertd.kernels.cutile.tools.inspect import compile_kernel
        from expertd.kernels.cutile.tools.registry import shipped_launches

        started = time.perf_counter()
        launch = next(shipped_launches(arch, Table()))
        compile_kernel(launch.kernel, launch.args, arch)
    except Exception as error:
        # Whatever the compiler, its package or its dependencies raise: the reader needs the reason, not a traceback.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return fail("compiler", f"{reason}; install cuda-tile with its compiler: pip install 'expertd[server]'")
    toolchain = Toolchain.detect()
    if not toolchain.measured:
        return warn("compiler", toolchain.advice)
    return ok("compiler", f"{toolchain} compiled a kernel for {arch} in {time.perf_counter() - started:.1f} s")


def gpu_memory(config: ServerConfig) -> int | None:
    """Free bytes of the GPUs, all together; None where a server would use none."""
    if config.backend == "torch" or not torch.cuda.is_available():
        return None
    return sum(torch.cuda.mem_get_info(device)[0] for device in devices_of(config, torch.cuda.device_count()))
