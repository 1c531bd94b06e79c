"""Reading single tensors out of a Hugging Face `safetensors` checkpoint, without loading whole files.

The format: eight bytes of little-endian header length, a JSON header with each tensor's dtype, shape and byte range
behind the header, then the data (Hugging Face safetensors, format description).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertd.kernels.model.config import MoeConfig
from expertd.kernels.weights.files import check_path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    # UE8M0: nothing but an exponent, a power of two from 2^-127 to 2^127, or NaN.
    "F8_E8M0": torch.float8_e8m0fnu,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F16": torch.float16,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file, the tensor, what was expected and found."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what its header says of it."""

    name: str
    file: Path
    dtype: str
    """As safetensors spells it: F8_E4M3, BF16, F32, ..."""
    shape: tuple[int, ...]
    start: int
    """Offset in the file, in bytes."""
    num_bytes: int

    def __getitem__(self, index: int) -> StoredTensor:
        """Entry `index` along the first axis: it lies in one piece, and can be read without the others."""
        entries, *shape = self.shape
        if not 0 <= index < entries:
            raise IndexError(f"tensor {self.name} has entries 0 to {entries - 1}, not {index}")
        size = self.num_bytes // entries
        return StoredTensor(
            f"{self.name}[{index}]", self.file, self.dtype, tuple(shape), self.start + index * size, size
        )


class _Opened:
    """An open file, closed once nobody has it any more: a number that was closed may be another file's by then."""

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_RDONLY)

    def __del__(self) -> None:
        # Not there where it could not be opened.
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, view: memoryview, start: int) -> int:
        return os.preadv(self._descriptor, [view], start)


class Checkpoint:
    """A folder with `config.json` and `safetensors` files. Reads are thread-safe and touch only the bytes asked for.

    They raise `CheckpointError` for what is not there, or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        check_path("folder", folder)
        self.folder = folder
        self.config = MoeConfig.from_json(folder / "config.json")
        self._files = self._read_index()
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._opened: dict[Path, _Opened] = {}

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r})"

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, each when the reads of it that are under way have ended; later reads open them again."""
        self._opened.clear()

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint names a tensor like this."""
        return name in self._files

    def find(self, name: str) -> StoredTensor:
        """What the checkpoint says of tensor `name`; raises `CheckpointError` when it is not there."""
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing from the checkpoint")
        stored = self._header(file).get(name)
        if stored is None:
            raise CheckpointError(
                f"{self.folder / file}: tensor {name} is missing; {INDEX} says that it is in this file"
            )
        return stored

    def read(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Read tensor `name`, which must have `shape` and one of `dtypes`."""
        return self.load(self.check(name, shape, *dtypes))

    def load(self, stored: StoredTensor) -> Tensor:
        """Read a tensor, or an entry of one, of a dtype that is known."""
        out = torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="cpu")
        self.read_into(stored, out)
        return out

    def check(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> StoredTensor:
        """Find tensor `name` and compare its header with what the model's configuration asks for."""
        stored = self.find(name)
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.file}: tensor {name}: expected shape {list(shape)}, found {list(stored.shape)}"
            )
        if DTYPES.get(stored.dtype) not in dtypes:
            expected = " or ".join(_spelling(dtype) for dtype in dtypes)
            raise CheckpointError(f"{stored.file}: tensor {name}: expected dtype {expected}, found {stored.dtype}")
        return stored

    def read_into(self, stored: StoredTensor, out: Tensor) -> None:
        """Read the bytes of `stored` into `out`, a contiguous host tensor of the same size in bytes."""
        self._fill(stored, 0, bytes_of(out)[: stored.num_bytes])

    def read_range(self, stored: StoredTensor, start: int, out: Tensor) -> None:
        """Read the bytes of `stored` from `start` on into all of `out`, a contiguous host tensor."""
        self._fill(stored, start, bytes_of(out))

    @cached_property
    def moe_tensors(self) -> tuple[str, ...]:
        """Names of all experts' and gates' tensors, sorted."""
        return tuple(sorted(filter(self.config.family.owns, self._files)))

    def file_states(self) -> dict[str, list[int]]:
        """Size and time of change [bytes, ns] of every file that tells of an expert or gate; [0, 0]: out of reach."""
        names = {self._files[name] for name in self.moe_tensors} | {"config.json", INDEX}
        return {name: _state(self.folder / name) for name in sorted(names)}

    def _fill(self, stored: StoredTensor, start: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = self._open(stored.file).read(view[done:], stored.start + start + done)
            except OSError as error:
                raise CheckpointError(
                    f"{stored.file}: tensor {stored.name} cannot be read: {error.strerror}"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{stored.file}: tensor {stored.name}: expected {stored.num_bytes} bytes, found {start + done}"
                )
            done += count

    def _read_index(self) -> dict[str, str]:
        """File name of every tensor."""
        index = self.folder / INDEX
        if index.exists():
            try:
                weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
                outside = [file for file in weight_map.values() if Path(file).name != file]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: expected JSON with a weight_map of file names: {error!r}") from None
            if outside:
                raise CheckpointError(f"{index}: expected names of files beside it, found {outside[0]!r}")
            return weight_map
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(_parse_header(self.folder / SINGLE), SINGLE)
        raise CheckpointError(f"{self.folder}: expected {INDEX} or {SINGLE}, found neither")

    def _header(self, file: str) -> dict[str, StoredTensor]:
        if file not in self._headers:
            self._headers[file] = _parse_header(self.folder / file)
        return self._headers[file]

    def _open(self, file: Path) -> _Opened:
        opened = self._opened.get(file)
        # setdefault: another thread may have opened the file meanwhile; the spare one is closed.
        return self._opened.setdefault(file, _Opened(file)) if opened is None else opened


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, flat."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _state(file: Path) -> list[int]:
    try:
        found = file.stat()
    except OSError:
        return [0, 0]
    return [found.st_size, found.st_mtime_ns]


def _parse_header(file: Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: expected a safetensors header within {size} bytes, found length {length}"
                )
            header: dict[str, Any] = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; {INDEX} names it") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: expected a JSON safetensors header, found: {error}") from None
    try:
        header.pop("__metadata__", None)
        tensors = {name: _stored(name, file, entry, 8 + length) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: malformed safetensors header: {error!r}") from None
    _check_disjoint(file, tensors.values())
    end = max((stored.start + stored.num_bytes for stored in tensors.values()), default=0)
    if end > size:
        last = max(tensors.values(), key=lambda stored: stored.start)
        raise CheckpointError(f"{file}: truncated: tensor {last.name}: expected {end} bytes in the file, found {size}")
    return tensors


def _check_disjoint(file: Path, tensors: Iterable[StoredTensor]) -> None:
    ordered = sorted(tensors, key=lambda stored: stored.start)
    for before, after in itertools.pairwise(ordered):
        if before.start + before.num_bytes > after.start:
            raise CheckpointError(f"{file}: tensors {before.name} and {after.name} overlap; expected disjoint ranges")


def _stored(name: str, file: Path, entry: dict[str, Any], data_start: int) -> StoredTensor:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (first, last, *shape)) or first > last:
        raise ValueError(f"{name}: data_offsets {entry['data_offsets']}, shape {entry['shape']}")
    dtype = DTYPES.get(entry["dtype"])
    if dtype is not None and last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {last - first} bytes for {entry['dtype']} {list(shape)}")
    return StoredTensor(name, file, entry["dtype"], shape, data_start + first, last - first)


def _spelling(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
