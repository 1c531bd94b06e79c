"""Tensors as bytes, and the dtypes that a message may have them in. Read tensors share the bytes and are read-only."""

from __future__ import annotations

import warnings
from typing import TypeAlias

import torch
from torch import Tensor

from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import InvalidBatch
from expertd.proto.lane.layout import QUANTIZATION_BLOCK, rows_bytes

HIDDEN_DTYPES = (torch.float8_e4m3fn, torch.bfloat16)
REPLY_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
STORED_DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float4_e2m1fn_x2)
"""Of checkpoints' weights."""

Bytes: TypeAlias = memoryview | Tensor
"""What a tensor's bytes lie in: a message or segment, or [n] uint8 on a GPU."""

with warnings.catch_warnings():
    # torch warns once a process that such a tensor is read-only, which is the intent here: let it do so now, unheard.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The contract calls its dtypes as torch does.
DTYPE_CODES: dict[torch.dtype, pb.DType] = {
    dtype: getattr(pb, f"DTYPE_{name_of(dtype).upper()}") for dtype in (*HIDDEN_DTYPES, *REPLY_DTYPES, *STORED_DTYPES)
}

DTYPES = {int(code): dtype for dtype, code in DTYPE_CODES.items()}


def check_dtype(field: str, code: int, accepted: tuple[torch.dtype, ...]) -> torch.dtype:
    """The dtype with a DType's number. Raises `InvalidBatch` unless it is an accepted one."""
    for dtype in accepted:
        if DTYPE_CODES[dtype] == code:
            return dtype
    names = {value: name for name, value in pb.DType.items()}
    choices = ", ".join(names[DTYPE_CODES[dtype]] for dtype in accepted)
    raise InvalidBatch(f"{field} is {names.get(code, code)}; accepted: {choices}")


def flat_bytes(tensor: Tensor) -> Tensor:
    """[n] uint8: the bytes of a tensor; a copy only when it is not contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def buffer(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, flat; a copy only when it is not contiguous or on a GPU."""
    return flat_bytes(tensor).numpy(force=True).data


def from_bytes(field: str, data: Bytes, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """`data`, or what a tensor [n] uint8 holds, as a tensor of `dtype`."""
    expected = shape[0] * shape[1] * dtype.itemsize
    if len(data) != expected:
        rows, columns = shape
        raise InvalidBatch(f"{field} has {len(data)} bytes; [{rows}, {columns}] {name_of(dtype)} takes {expected}")
    if not expected:
        return torch.empty(shape, dtype=dtype)
    values = data.view(dtype) if isinstance(data, Tensor) else torch.frombuffer(data, dtype=dtype)
    return values.view(shape)


def sums_from_bytes(
    field: str, data: Bytes, dtype: torch.dtype, shape: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Sums [T, H] of `dtype`, as a reply has them; of FP8 with their scales [T, H/128] float32."""
    tokens, width = shape
    if dtype != torch.float8_e4m3fn:
        return from_bytes(field, data, dtype, shape), None
    expected = rows_bytes(dtype, tokens, width)
    blocks = width // QUANTIZATION_BLOCK
    if len(data) != expected:
        raise InvalidBatch(
            f"{field} has {len(data)} bytes; [{tokens}, {width}] {name_of(dtype)}"
            f" with scales [{tokens}, {blocks}] float32 takes {expected}"
        )
    values = from_bytes(field, data[: tokens * width], dtype, shape)
    return values, from_bytes(field, data[tokens * width :], torch.float32, (tokens, blocks))
