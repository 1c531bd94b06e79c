"""Launching cuTile kernels: what every host wrapper builds, and what the compile tests read without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import cuda.tile as ct
import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch on the current stream, repeatable; on meta tensors it only names what would be compiled."""

    kernel: ct.kernel
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    overlaps: bool = False
    """Whether its blocks may start while the kernel before it ends: that kernel and this one call `take_turn`."""

    @property
    def name(self) -> str:
        """The name of the kernel's function, without its suffix."""
        return str(self.kernel._pyfunc.__name__).partition("_kernel")[0]

    def __call__(self) -> None:
        stream = torch.cuda.current_stream()
        ct.launch(stream, self.grid, self.kernel, self.args, programmatic_dependent_launch=self.overlaps)


@dataclass(frozen=True, slots=True)
class Gpu:
    """What kernels are chosen and grids are sized by."""

    arch: str
    """As compilers name it: "sm_90"."""
    processors: int
    """Streaming multiprocessors."""

    @classmethod
    def of(cls, device: torch.device) -> Gpu:
        properties = torch.cuda.get_device_properties(device)
        return cls(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def take_turn() -> None:
    """In a kernel, before it touches memory that others write: let the next one start, wait for the kernel before.

    The next one waits, too, so that several in a row may be there: each ends only after the one before it.
    """
    ct.grid_dependency_control_launch_dependents()
    ct.grid_dependency_control_wait()


@cache
def hinted(kernel: ct.kernel, num_worker_warps: int | None = None, occupancy: int | None = None) -> ct.kernel:
    """`kernel` with compiler hints; one object for each combination, because compiled code is kept in the object."""
    return kernel.replace_hints(num_worker_warps=num_worker_warps, occupancy=occupancy)
