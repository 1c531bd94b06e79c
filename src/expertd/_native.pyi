"""The native core, `native/`: what is too hot for Python, computed without the interpreter's lock where that is long.

Memory comes as addresses in this process, which must hold what is stated and stay alive during the call; nothing checks
that here. `expertd.kernels.numerics.tokens` takes tensors instead, and does. Elements of a row lie side by side,
aligned or not; `Place` is the address of a matrix and the bytes from one of its rows to the next.

Results depend neither on the instruction set nor on the number of threads. Above 256 KiB a call spreads over threads
that all calls share: as many as there are usable CPUs (affinity and cgroup quota), but no more than 8, the calling one
among them. They start when they are first needed, and anew in a child made by fork.
"""

from collections.abc import Sequence
from typing import TypeAlias

from typing_extensions import Buffer

Place: TypeAlias = tuple[int, int]
Format: TypeAlias = int
BFLOAT16: Format
FLOAT16: Format
FLOAT32: Format

def instruction_set() -> str:
    """What the next calls compute with: avx512, avx2, sse4.2 (checksums only), armv8-crc (the same) or portable."""

def use_instruction_set(name: str, /) -> bool:
    """Compute with another one from now on, for tests; False, changing nothing, where this processor lacks it."""

def pool_size() -> int:
    """Threads that compute at once at most, the calling one among them."""

def crc32c(data: Buffer, value: int = 0) -> int:
    """CRC-32C of contiguous bytes that follow others with checksum `value`."""

def quantize(hidden: Place, stored: Format, tokens: int, width: int, out: Place, scales: Place, /) -> None:
    """hidden [tokens, width] -> out [tokens, width] E4M3 and scales [tokens, width / 128] FP32, one a 1x128 block.

    Bit-equal to `expertd.kernels.numerics.quantize.quantize_activations` on CPUs, NaN and infinity included.
    """

def gather(source: Place, rows: int, row_bytes: int, indices: int, count: int, out: Place, /) -> None:
    """out[i] = source[indices[i]] for [count] int64 indices; `IndexError` unless all are from 0 to `rows` - 1."""

def split(
    ids: int, weights: int, tokens: int, top_k: int, owner: int, experts: int, out: tuple[int, int, int], /
) -> tuple[list[tuple[int, int]], list[int]]:
    """Sort [tokens, top_k] int32 ids, negative for none, and FP32 weights by their experts' servers.

    `owner` is [experts] int64: each expert's server, negative for nobody. `out` has room for tokens * top_k rows of
    int64 tokens, int32 ids [top_k] and FP32 weights [top_k]; they are written server by server, tokens ascending, -1
    and 0 where a pair is another server's. Returns (server, rows), ascending, and the chosen experts that nobody owns:
    with any, nothing is written. `IndexError` for an id that `owner` lacks.
    """

def count_pairs(ids: int, count: int, /) -> dict[int, int]:
    """How often [count] int32 ids name each expert, ascending; negative ids are none."""

def sum_parts(
    parts: Sequence[tuple[Place, Format, int, int, int]], rows: int, width: int, stored: Format, out: Place, /
) -> None:
    """Write to each row of `out` [rows, width] its parts, added in FP32 to 0 in the order of `parts`, rounded once.

    A part is the place and format of its sums [n, width], n, the address of [n] int64 rows of `out`, and that of [n]
    FP32 weights that they are multiplied with, or 0. `IndexError` unless a part's rows ascend below `rows`. `out` is
    BFLOAT16 or FLOAT32, as `stored` says; in BFLOAT16 any NaN becomes 0xffff, as torch has it on x86.
    """
