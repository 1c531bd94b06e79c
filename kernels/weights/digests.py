"""Digests of contents: SHA-256 over a tensor as the checkpoint stores it, and over all tensors of an expert.

SHA-256 because digests are signed: it resists collisions, every machine has tools for it, and a few cores with its
instructions keep up with loading; see docs/measurements.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from expertd.kernels.weights.checkpoint import Checkpoint, StoredTensor, bytes_of

CHUNK = 1 << 20
"""Bytes read at once where nothing else is done with them: they are hashed while they are in the processor's cache."""


def header(stored: StoredTensor) -> bytes:
    """What a tensor's digest covers besides its bytes. It does not say in which file the tensor lies."""
    return f"{stored.name} {stored.dtype} {list(stored.shape)}\n".encode()


def tensor_digest(stored: StoredTensor, content: Tensor) -> bytes:
    """Of a tensor whose bytes were read into `content`, contiguous."""
    digest = hashlib.sha256(header(stored))
    digest.update(bytes_of(content))
    return digest.digest()


def read_digest(checkpoint: Checkpoint, stored: StoredTensor) -> bytes:
    """The `tensor_digest` of a tensor that is read for nothing else. Raises `CheckpointError`."""
    digest = hashlib.sha256(header(stored))
    buffer = torch.empty(min(CHUNK, stored.num_bytes), dtype=torch.uint8, device="cpu")
    for start in range(0, stored.num_bytes, CHUNK):
        part = buffer[: stored.num_bytes - start]
        checkpoint.read_range(stored, start, part)
        digest.update(bytes_of(part))
    return digest.digest()


def expert_digest(tensors: Iterable[bytes]) -> bytes:
    """Of an expert, from its tensors' digests: up, gate and down, each one's weight before its scales."""
    return hashlib.sha256(b"".join(tensors)).digest()
