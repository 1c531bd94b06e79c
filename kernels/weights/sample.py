"""The fingerprint by samples: tells checkpoints apart without reading all of their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from expertd.kernels.weights.checkpoint import Checkpoint, StoredTensor, bytes_of
from expertd.kernels.weights.digests import header

PAGE = 4096
PAGES = 4
"""Read of each expert's weight: one of each quarter, at a place that the tensor's name decides."""
SCALES = "_scale_inv"
"""Ends the names of scales of FP8 blocks."""
READERS = 16


def sampled_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256, in hex, over the configuration, the headers of all experts' and gates' tensors, all scales of FP8 blocks
    and all gates, and `PAGES` pages of every expert's every weight, and of its exponents where that is MXFP4.

    Any scaling or training of weights moves it; a change of single bytes does so only where a page is sampled, which a
    manifest of digests is for. Raises `CheckpointError`.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config.fields, sort_keys=True).encode())
    with ThreadPoolExecutor(READERS, thread_name_prefix="samples") as readers:
        for sampled in readers.map(lambda stored: _sampled(checkpoint, stored), _entries(checkpoint)):
            digest.update(sampled)
    return digest.hexdigest()


def _entries(checkpoint: Checkpoint) -> Iterator[StoredTensor]:
    """All experts' and gates' tensors; of one that holds all experts of a layer, each expert's part."""
    for stored in map(checkpoint.find, checkpoint.moe_tensors):
        if len(stored.shape) == 3:
            yield from (stored[expert] for expert in range(stored.shape[0]))
        else:
            yield stored


def _sampled(checkpoint: Checkpoint, stored: StoredTensor) -> bytes:
    digest = hashlib.sha256(header(stored))
    for start, size in _places(stored):
        page = torch.empty(size, dtype=torch.uint8, device="cpu")
        checkpoint.read_range(stored, start, page)
        digest.update(bytes_of(page))
    return digest.digest()


def _places(stored: StoredTensor) -> Iterator[tuple[int, int]]:
    """(offset in the tensor, bytes) of what is read of it."""
    quarter = stored.num_bytes // PAGES
    # Exponents of MXFP4 are a sixteenth of all bytes, too many to be read whole.
    is_sampled = ".experts." in stored.name and SCALES not in stored.name
    if not is_sampled or quarter <= PAGE:
        yield 0, stored.num_bytes
        return
    seed = hashlib.sha256(stored.name.encode()).digest()
    for number in range(PAGES):
        place = int.from_bytes(seed[8 * number : 8 * number + 8])
        yield number * quarter + place % (quarter - PAGE + 1), PAGE
