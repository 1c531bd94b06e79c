"""Triton's kernels of stream-ordered calls, compiled for GPUs that are not here, with the arguments that calls give.

    python -m tests.support.kernels.stream sm_90 [WARPS]

prints what each compiled kernel uses, as JSON; with WARPS, the largest alone with so many in place of its own. In a
process of its own: where tests have Triton interpret kernels, it compiles none.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from expertd.client.stream import kernels
from expertd.client.stream.launch import enqueue
from expertd.client.stream.tables import Tables
from expertd.client.stream.terms import Terms
from expertd.kernels.cutile.tools.inspect import Resources, read_resources
from expertd.kernels.numerics.quantize import FP8

META = torch.device("meta")
SERVERS, MAX_TOKENS, TOP_K, EXPERTS, HIDDEN = 2, 1024, 8, 256, 7168
FEW, MANY = 8, 600
"""Tokens that every server gets, and that are compacted."""
NAMES = ("compact", "dispatch", "post", "settle", "combine")
TYPES = {
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


class Recorder:
    """In a kernel's place: what it is launched with."""

    def __init__(self, kernel: Any, found: list[Launch]) -> None:  # noqa: ANN401
        self._kernel = kernel
        self._found = found

    def __getitem__(self, _: object) -> Callable[..., None]:
        def launch(*arguments: object, **options: int) -> None:
            self._found.append(Launch(self._kernel, arguments, options))

        return launch


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: tuple[object, ...]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """With what it is compiled for."""
        kinds = [type_of(one) for one in self.arguments if isinstance(one, torch.Tensor)]
        pairs = zip(self.kernel.params, self.arguments, strict=True)
        flags = {parameter.name: value for parameter, value in pairs if parameter.is_constexpr}
        return f"{self.kernel.__name__}({', '.join(kinds)}; {flags})"

    def compile(self, arch: str) -> bytes:
        """Its cubin, as Triton would compile it when it is launched: with what it assumes of aligned addresses."""
        signature, constants, attributes = {}, {}, {}
        for index, (parameter, value) in enumerate(zip(self.kernel.params, self.arguments, strict=True)):
            signature[parameter.name] = "constexpr" if parameter.is_constexpr else type_of(value)
            if parameter.is_constexpr:
                constants[(index,)] = value
            elif not parameter.do_not_specialize and (isinstance(value, torch.Tensor) or int(value) % 16 == 0):  # type: ignore[call-overload]
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        compiled: bytes = triton.compile(source, target=target, options=self.options).asm["cubin"]
        return compiled


def type_of(value: object) -> str:
    return f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"


def terms_of(hidden_dtype: torch.dtype, reply_dtype: torch.dtype) -> Terms:
    """On a device that has no memory."""
    sizes = 1, 8, 64, 256, MAX_TOKENS
    return Terms("m", (3, 4), sizes, HIDDEN, TOP_K, EXPERTS, hidden_dtype, reply_dtype, device=META, timeout=1.0)


def launches() -> Iterator[Launch]:
    """Every one, once."""
    found: list[Launch] = []
    for name in NAMES:
        setattr(kernels, name, Recorder(getattr(kernels, name), found))
    dtypes = ((FP8, torch.bfloat16), (torch.bfloat16, torch.float32))
    for (dtype, reply), kind, tokens in itertools.product(dtypes, (torch.int32, torch.int64), (FEW, MANY)):
        hidden = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device=META)
        ids = torch.empty(tokens, TOP_K, dtype=kind, device=META)
        weights = torch.empty(tokens, TOP_K, device=META)
        terms = terms_of(dtype, reply)
        enqueue(terms, Tables.empty(SERVERS, terms), [], 0, hidden, ids, weights, torch.empty_like(hidden))
    return iter({launch.name: launch for launch in found}.values())


def inspect(arch: str, warps: int | None) -> dict[str, Resources]:
    """By name."""
    wanted = launches()
    if warps is not None:
        largest = next(launch for launch in wanted if launch.kernel.__name__ == "dispatch")
        wanted = iter([dataclasses.replace(largest, options={"num_warps": warps})])
    return {launch.name: read_resources(launch.compile(arch)) for launch in wanted}


if __name__ == "__main__":
    found = inspect(sys.argv[1], int(sys.argv[2]) if sys.argv[2:] else None)
    print(json.dumps({name: dataclasses.asdict(used) for name, used in found.items()}))
