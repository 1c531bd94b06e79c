"""How servers on one machine share its CPUs: each lets the others see it, and takes a share of them by default."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from expertd._native import usable_cpus

MARK = "@expertd-server-"
SOCKETS = Path("/proc/net/unix")


@contextlib.contextmanager
def announced() -> Iterator[None]:
    """Let other servers see this one: the name of a socket goes with its process, however that ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mark:
        # Where names without files are unknown, servers do not see each other.
        with contextlib.suppress(OSError):
            mark.bind(f"\0{MARK[1:]}{os.getpid()}-{secrets.token_hex(4)}")
        yield


def count_servers() -> int:
    """Servers of this machine, or of this container's network, that are announced."""
    try:
        lines = SOCKETS.read_text(errors="replace").splitlines()
    except OSError:
        return 0
    return sum(line.rpartition(" ")[2].startswith(MARK) for line in lines)


@dataclass(frozen=True, slots=True)
class CpuShare:
    """What a server computes on, beside the others."""

    threads: int
    cpus: int
    others: int

    @classmethod
    def of(cls, threads: int | None, cpus: int, others: int, most: int) -> CpuShare:
        """For a server that is told so many `threads`; None: a fair part of the CPUs, and at `most` so many."""
        return cls(threads or max(1, min(most, cpus // (1 + others))), cpus, others)

    @classmethod
    def of_now(cls, threads: int | None, announced: bool = True) -> CpuShare:
        """On this machine; `announced`: the server is one of those that are counted."""
        # What torch would take by itself knows of OMP_NUM_THREADS, and of processors with two threads a core.
        return cls.of(threads, usable_cpus(), count_servers() - announced, torch.get_num_threads())

    @property
    def crowded(self) -> bool:
        """Whether as many threads for every server are more than there are CPUs."""
        return self.threads * (1 + self.others) > max(self.cpus, 1 + self.others)

    def __str__(self) -> str:
        return f"torch computes on {self.threads} of {self.cpus} CPUs, beside {self.others} other servers here"
