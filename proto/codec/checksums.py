"""What tells that a request or its answer was altered on its way: CRC-32C, over what the contract names."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from expertd._native import crc32c

_NUMBERS = (
    *("request_id", "placement_epoch", "layer", "num_tokens", "top_k", "hidden_dtype", "reply_dtype"),
    *("segment_offset", "gpu_offset"),
)
_ABSENT = 2**64 - 1
_WORDS = struct.Struct(f"<{len(_NUMBERS) + 1}Q")


def bytes_checksum(parts: Iterable[memoryview]) -> int:
    """Of all bytes of `parts`, one after another."""
    checksum = 0
    for part in parts:
        checksum = crc32c(part, checksum)
    return checksum


def fields_checksum(fields: Mapping[str, Any], tensors_checksum: int | None) -> int:
    """Of the ExecuteRequest with these fields, and with that of its tensors if it has one."""
    words = (fields[name] for name in _NUMBERS)
    packed = _WORDS.pack(*(_ABSENT if word is None else word for word in (*words, tensors_checksum)))
    # Younger than the others: requests without it have the checksum that they had before.
    if fields["sums_offset"] is not None:
        packed += fields["sums_offset"].to_bytes(8, "little")
    return crc32c(fields["model_fingerprint"], crc32c(packed))


def sums_checksum(request_id: int, sums: memoryview) -> int:
    """Of an answer."""
    return crc32c(sums, crc32c(request_id.to_bytes(8, "little")))


def fixed32(checksum: int) -> bytes:
    """As it travels."""
    return checksum.to_bytes(4, "little")
