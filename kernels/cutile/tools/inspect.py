"""Compile a cuTile kernel for any architecture without a GPU, and read what the compiler spent on it."""

from __future__ import annotations

import inspect
import io
import re
import shutil
import subprocess
import tempfile
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import cuda.tile as ct
import torch
from cuda.tile.compilation import (
    ArrayConstraint,
    CallingConvention,
    ConstantConstraint,
    KernelSignature,
    ScalarConstraint,
    export_kernel,
)
from torch import Tensor

ALIGNMENT = 16
"""Bytes to which a launch finds PyTorch's addresses and strides aligned, and the divisor it looks for in shapes."""
WORKER_WARPS = 4
"""That the compiler takes where a kernel does not say."""
_DTYPES = {
    torch.float8_e4m3fn: ct.float8_e4m3fn,
    torch.bfloat16: ct.bfloat16,
    torch.float16: ct.float16,
    torch.float32: ct.float32,
    torch.uint8: ct.uint8,
    torch.int32: ct.int32,
    torch.int64: ct.int64,
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel uses."""

    registers: int
    """Registers a thread."""
    stack: int
    """Bytes of stack a thread; anything but 0 means spills or arrays in local memory."""
    shared: int
    """Bytes of shared memory a block: how deep the loads are pipelined."""
    local_accesses: int
    """STL and LDL instructions: stores to and loads from local memory."""
    matrix: tuple[str, ...]
    """Matrix instructions in use: HGMMA and QGMMA are Hopper's fast ones, UTCHMMA and UTCQMMA Blackwell's."""
    matrix_waits: float
    """Waits for each of Hopper's matrix instructions: near 1 they run one after the other, near 0.2 they overlap."""
    bulk_loads: int
    """UTMALDG instructions: loads by the tensor memory accelerator."""
    shortage: int
    """Registers that a block's warps ask for beyond those it has: with any, they wait for them and the kernel hangs."""

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local_accesses > 0


def compile_kernel(kernel: ct.kernel, args: Sequence[Any], arch: str) -> bytes:
    """The cubin of `kernel` for `arch` ("sm_90", ...), as launched with `args`; tensors may be on the meta device.

    Raises `cuda.tile.TileError` if it does not compile.
    """
    cubin = io.BytesIO()
    export_kernel(kernel, [signature(kernel, args)], cubin, gpu_code=arch, output_format="cubin")
    return cubin.getvalue()


def inspect_kernel(kernel: ct.kernel, args: Sequence[Any], arch: str) -> Resources:
    """Compile `kernel` for `arch` as launched with `args` and read its resources from the cubin."""
    warps = kernel._compiler_options.num_worker_warps or WORKER_WARPS
    return read_resources(compile_kernel(kernel, args, arch), warps)


def read_resources(cubin: bytes, worker_warps: int = WORKER_WARPS) -> Resources:
    """What the one kernel in `cubin` uses, whoever compiled it; `worker_warps` of a block compute."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("--dump-resource-usage", path)
        sass = _cuobjdump("--dump-sass", path)
        elf = _cuobjdump("--dump-elf", path)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    waits = len(re.findall(r"\bWARPGROUP\.DEPBAR\b", sass))
    return Resources(
        registers=used["REG"],
        stack=used["STACK"],
        shared=used["SHARED"],
        local_accesses=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        matrix=tuple(sorted(set(re.findall(r"\b[A-Z]+MMA\b", sass)))),
        matrix_waits=waits / max(1, len(re.findall(r"\b[HQ]GMMA\b", sass))),
        bulk_loads=len(re.findall(r"\bUTMALDG\b", sass)),
        shortage=_shortage(sass, elf, 32 * worker_warps, used["REG"]),
    )


def _threads(elf: str) -> int:
    """Threads a block: workers, and warps that only move data."""
    found = re.search(r"EIATTR_REQNTID\s+Format:\s*\S+\s+Value:\s*(0x[0-9a-f]+)", elf)
    if found is None:
        raise ValueError("the cubin does not say how many threads a block has (EIATTR_REQNTID)")
    return int(found[1], 16)


def _shortage(sass: str, elf: str, workers: int, registers: int) -> int:
    """What workers take less what movers give back of the block's `registers` a thread; 0 where warps have no roles."""
    taken = re.search(r"\bUSETMAXREG\.TRY_ALLOC\S* \w+, (0x[0-9a-f]+)", sass)
    kept = re.search(r"\bUSETMAXREG\.DEALLOC\S* (0x[0-9a-f]+)", sass)
    if taken is None or kept is None:
        return 0
    threads = _threads(elf)
    wanted = workers * int(taken[1], 16) + (threads - workers) * int(kept[1], 16)
    return max(0, wanted - threads * registers)


def signature(kernel: ct.kernel, args: Sequence[Any]) -> KernelSignature:
    """The signature that a launch with `args` would compile: what PyTorch's allocator aligns is assumed aligned."""
    function = kernel._pyfunc
    hints = typing.get_type_hints(function, include_extras=True)
    names = inspect.signature(function).parameters
    constraints = [_constraint(value, hints.get(name)) for name, value in zip(names, args, strict=True)]
    unnamed = KernelSignature(constraints, CallingConvention.cutile_python_v1())
    return unnamed.with_mangled_symbol(function.__name__)


def _constraint(value: object, hint: object) -> ArrayConstraint | ConstantConstraint | ScalarConstraint:
    metadata = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    if isinstance(value, Tensor):
        array = next((item for item in metadata if isinstance(item, ct.ArrayAnnotation)), ct.ArrayAnnotation())
        return _array_constraint(value, array.index_dtype)
    if any(isinstance(item, ct.ConstantAnnotation) for item in metadata):
        return ConstantConstraint(value)
    return ScalarConstraint(ct.float32 if isinstance(value, float) else ct.int32)


def _array_constraint(tensor: Tensor, index_dtype: ct.DType) -> ArrayConstraint:
    elements = ALIGNMENT // tensor.element_size()
    return ArrayConstraint(
        _DTYPES[tensor.dtype],
        tensor.ndim,
        index_dtype=index_dtype,
        stride_lower_bound_incl=0,
        alias_groups=(),
        may_alias_internally=False,
        stride_constant=[1 if stride == 1 else None for stride in tensor.stride()],
        stride_divisible_by=[elements if stride % elements == 0 else 1 for stride in tensor.stride()],
        shape_divisible_by=[ALIGNMENT if size % ALIGNMENT == 0 else 1 for size in tensor.shape],
        base_addr_divisible_by=ALIGNMENT,
    )


@cache
def _cuobjdump_path() -> str:
    """`cuobjdump` on PATH, or the one that the package nvidia-cuda-cuobjdump installs beside this interpreter."""
    import nvidia

    beside = [str(Path(root) / "cu13" / "bin") for root in nvidia.__path__]
    for path in (None, *beside):
        if found := shutil.which("cuobjdump", path=path):
            return found
    raise FileNotFoundError("cuobjdump is not installed: pip install nvidia-cuda-cuobjdump")


def _cuobjdump(option: str, cubin: Path) -> str:
    return subprocess.run([_cuobjdump_path(), option, cubin], check=True, capture_output=True, text=True).stdout
