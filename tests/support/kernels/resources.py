"""What the compiler spends on the shipped kernels, without a GPU.

`python -m tests.support.kernels.resources` writes it to `TABLE`: to be done, and read, when kernels or their compiler
change.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

import expertd.kernels.cutile.pipeline.table
from expertd.kernels.cutile.base.launch import Launch
from expertd.kernels.cutile.pipeline.table import SHIPPED, Table
from expertd.kernels.cutile.pipeline.toolchain import Toolchain
from expertd.kernels.cutile.tools.inspect import Resources, inspect_kernel, signature
from expertd.kernels.cutile.tools.registry import shipped_launches
from expertd.kernels.weights.files import write_json
from tests.support.serving import forked_processes

TABLE = Path(__file__).parents[2] / "kernels/cutile/tools/data/resources.json"
GPU, ARCH = "NVIDIA H200", "sm_90"
"""Whose choices are in the table: the only ones that were measured."""
TUNED = Path(expertd.kernels.cutile.pipeline.table.__file__).parent / "tuned"
PROCESSES = 2


def shipped_table(gpu: str) -> Table:
    return Table.from_json(json.loads((TUNED / SHIPPED[gpu]).read_text()))


@cache
def unique_launches(arch: str, gpu: str | None = None) -> list[Launch]:
    """One launch for each kernel, signature and set of hints, in the choices shipped for `gpu` or the default ones."""
    launches = {}
    for launch in shipped_launches(arch, Table() if gpu is None else shipped_table(gpu)):
        launches[launch.kernel, signature(launch.kernel, launch.args).symbol] = launch
    return list(launches.values())


def name(launch: Launch) -> str:
    """The kernel, its constants, and its arrays' types in their order."""
    constants = [value for value in launch.args if not isinstance(value, torch.Tensor)]
    types = [str(value.dtype).partition(".")[2] for value in launch.args if isinstance(value, torch.Tensor)]
    hints = launch.kernel._compiler_options
    return f"{launch.name}{constants} of {' '.join(types)}, warps {hints.num_worker_warps}, occupancy {hints.occupancy}"


def inspected(gpu: str, arch: str) -> dict[str, Resources]:
    """What every kernel in the choices shipped for `gpu` uses. Kernels whose names are alike are numbered."""
    count = len(unique_launches(arch, gpu))
    with forked_processes(PROCESSES) as pool:
        return _named(pool, count, gpu, arch)


def _named(pool: ProcessPoolExecutor, count: int, gpu: str, arch: str) -> dict[str, Resources]:
    found: dict[str, Resources] = {}
    for key, resources in pool.map(_inspect, range(count), [gpu] * count, [arch] * count):
        alike = sum(other.partition(" #")[0] == key for other in found)
        found[f"{key} #{alike + 1}" if alike else key] = resources
    return found


def _inspect(index: int, gpu: str, arch: str) -> tuple[str, Resources]:
    """Kernels do not travel between processes, so that each has a list of its own."""
    launch = unique_launches(arch, gpu)[index]
    return name(launch), inspect_kernel(launch.kernel, launch.args, arch)


def line(used: Resources) -> str:
    spent = (
        f"{used.registers} registers, {used.stack} stack, {used.local_accesses} local accesses, {used.shared} shared,"
        f" {used.bulk_loads} bulk loads"
    )
    return f"{spent}, {used.matrix_waits:.2f} waits a {'+'.join(used.matrix)}" if used.matrix else spent


def as_table(found: dict[str, Resources]) -> dict[str, Any]:
    """As the file has it."""
    rows = {key: line(used) for key, used in found.items()}
    return {"toolchain": str(Toolchain.detect()), "gpu": GPU, "arch": ARCH, "kernels": rows}


if __name__ == "__main__":
    write_json(as_table(inspected(GPU, ARCH)), TABLE)
