"""The record: what was found of a checkpoint's content earlier, for as long as its files stay as they are."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any, TypeAlias

from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.files import cache_folder, write_json

log = logging.getLogger(__name__)
RECORD = "expertd.digests.json"
FORMAT = 1
"""Raise it when digests or samples are taken in another way."""
SETTLED_NS = 2_000_000_000
"""Age of a file whose next change is sure to give it another time; younger ones are not recorded."""

Digests: TypeAlias = dict[tuple[int, int], bytes]
"""(layer, expert) -> SHA-256."""


class Record:
    """Fingerprint and experts' digests that were found while all files had the sizes and times that they have now.

    It spares reading and sees bytes that changed by themselves. It proves nothing: who writes the weights can write it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Empty when nothing was recorded of these files, or nothing that can be read."""
        self._files = checkpoint.file_states()
        self._checkpoint = checkpoint
        self._paths = (checkpoint.folder / RECORD, *_elsewhere(checkpoint.folder))
        self.path, self.fingerprint, self.experts = self._read()

    def save(self, fingerprint: str | None, experts: Digests) -> None:
        """Add what was found to what others recorded meanwhile; nothing when a file changed since this record was read.

        Beside the checkpoint, or in the cache folder where that cannot be written.
        """
        if self._checkpoint.file_states() != self._files:
            return
        if time.time_ns() - max(changed for _, changed in self._files.values()) < SETTLED_NS:
            return
        _, known, others = self._read()
        content = {
            "format": FORMAT,
            "files": self._files,
            "fingerprint": fingerprint or known,
            "experts": _to_json(others | experts),
        }
        for path in self._paths:
            try:
                write_json(content, path)
            except OSError as error:
                log.info("digests are not kept in %s: %s", path, error.strerror)
            else:
                return

    def _read(self) -> tuple[Path, str | None, Digests]:
        for path in self._paths:
            try:
                content = json.loads(path.read_text())
                if content["format"] == FORMAT and content["files"] == self._files:
                    return path, content["fingerprint"], _from_json(content["experts"])
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                continue
        return self._paths[0], None, {}


def _elsewhere(folder: Path) -> tuple[Path, ...]:
    """In the cache folder, for who has one."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    try:
        return (cache_folder() / "digests" / f"{name}.json",)
    except RuntimeError:
        return ()


def _to_json(experts: Digests) -> dict[str, dict[str, str]]:
    layers: dict[str, dict[str, str]] = {}
    for (layer, expert), digest in experts.items():
        layers.setdefault(str(layer), {})[str(expert)] = digest.hex()
    return layers


def _from_json(layers: dict[str, dict[str, Any]]) -> Digests:
    return {
        (int(layer), int(expert)): bytes.fromhex(digest)
        for layer, experts in layers.items()
        for expert, digest in experts.items()
    }
