"""Checks of what callers share with servers on GPUs: one GPU by NVIDIA MPS, and memory of one with another."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from expertd.server.doctor.finding import Finding, ok, warn
from expertd.server.options.config import ServerConfig

PIPES, DEFAULT_PIPES = "CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"
"""What names the folder of the control daemon's pipe, and where it is otherwise."""
WITHOUT_MPS, WITH_MPS = "about 2.5 ms", "0.07 ms"
"""What a stream-ordered call of one token takes on the server's own GPU: measured on an H200."""


def check_sharing(config: ServerConfig) -> Iterator[Finding]:
    """MPS and peer access, where --backend would use a GPU and there is one."""
    if config.backend != "torch" and torch.cuda.is_available():
        yield check_mps()
        yield check_reach(torch.cuda.device_count(), torch.cuda.can_device_access_peer)


def check_mps(folder: Path | None = None) -> Finding:
    """Whether programs of this environment become clients of MPS; `folder` is where its pipe would be."""
    folder = folder or Path(os.environ.get(PIPES) or DEFAULT_PIPES)
    if is_answered(folder / "control"):
        return ok("mps", f"runs, its pipe is in {folder}: callers on the server's GPU compute beside it")
    return warn(
        "mps",
        f"no control daemon listens in {folder}: callers on the server's own GPU take turns with it, and a"
        f" stream-ordered call of one token takes {WITHOUT_MPS} in place of {WITH_MPS}. Start it before servers and"
        f" callers, as their user: `nvidia-cuda-mps-control -d`, with the same {PIPES}",
    )


def is_answered(pipe: Path) -> bool:
    """Whether somebody listens at a named pipe or socket, who does not hear that it was asked."""
    try:
        if stat.S_ISSOCK(pipe.stat().st_mode):
            return _is_bound(pipe)
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return stat.S_ISFIFO(pipe.stat().st_mode)


def _is_bound(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        # Of another type than the daemon's, which it therefore never sees: a socket left behind refuses it before that.
        return asking.connect_ex(str(path)) in (0, errno.EPROTOTYPE)


def check_reach(gpus: int, reaches: Callable[[int, int], bool]) -> Finding:
    """Which of the GPUs seen here use which others' memory; `reaches(a, b)` for different ones."""
    if gpus < 2:
        return ok(
            "gpu peers",
            "one GPU is seen here: others of this machine share memory with it where NVLink or PCIe peer access joins"
            " them; else their calls go through host memory, and callers' logs say so",
        )
    seen = {gpu: [other for other in range(gpus) if other != gpu and reaches(gpu, other)] for gpu in range(gpus)}
    if all(len(others) == gpus - 1 for others in seen.values()):
        return ok("gpu peers", f"each of the {gpus} GPUs reaches the memory of all others")
    shown = "; ".join(f"{gpu} reaches {', '.join(map(str, others)) or 'none'}" for gpu, others in seen.items())
    return warn(
        "gpu peers",
        f"{shown}: calls between the others go through host memory; see `nvidia-smi topo -p2p rw` and, on virtual"
        " machines, how GPUs are passed through",
    )
