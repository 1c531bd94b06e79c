"""The ledger: which content a checkpoint must have, and which its experts were found to have while they were loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.manifest import MANIFEST, Manifest
from expertd.kernels.weights.record import Digests, Record
from expertd.kernels.weights.sample import sampled_fingerprint

log = logging.getLogger(__name__)


class Ledger:
    """Names a checkpoint's content, and checks what is loaded of it against its manifest, or else its record."""

    def __init__(self, checkpoint: Checkpoint, manifest: Path | None = None) -> None:
        """`manifest`: None for the one in the checkpoint's folder, if it is there. Without one the fingerprint is made
        of samples, which takes seconds unless it was recorded. Raises `CheckpointError`."""
        self.checkpoint = checkpoint
        default = checkpoint.folder / MANIFEST
        self.path = manifest or (default if default.exists() else None)
        self.manifest = None if self.path is None else Manifest.read(self.path)
        self._record = Record(checkpoint)
        self._found: Digests = {}
        if self.manifest is None:
            self._sampled: str | None = self._record.fingerprint or _sample(checkpoint)
            self.fingerprint = self._sampled
            if self._record.fingerprint is None:
                self.save()
            return
        self._sampled = None
        self.fingerprint = self.manifest.fingerprint
        for difference in self.manifest.config_differences(checkpoint.config):
            raise CheckpointError(f"{checkpoint.folder}/config.json is not what {self.path} was made of: {difference}")

    def __str__(self) -> str:
        """For people: the fingerprint, and what it stands for."""
        return f"{self.fingerprint}, {f'the manifest {self.path}' if self.path else 'of samples, without a manifest'}"

    def settle(self, layer: int, expert: int, digest: bytes) -> None:
        """Tell the digest of what was loaded. Raises `CheckpointError` unless it is what it must be."""
        if self.manifest is not None:
            wanted = self.manifest.digest(layer, expert)
            source, advice = (
                self.path,
                "the file is damaged or another one: copy it again, or use the manifest of this checkpoint;"
                " 'expertd fingerprint FOLDER --check MANIFEST' names all that differs",
            )
        else:
            wanted = self._record.experts.get((layer, expert), digest)
            source, advice = (
                self._record.path,
                "its files have kept their sizes and times since that was written, so the disk or memory is at fault;"
                " if you did replace them, remove that file",
            )
        if digest != wanted:
            said = "has none for it" if wanted is None else f"says {wanted.hex()}"
            raise CheckpointError(
                f"layer {layer}, expert {expert}: the weights that were loaded have digest {digest.hex()}, but {source}"
                f" {said}: {advice}"
            )
        self._found[layer, expert] = digest

    def found(self, experts: Mapping[int, Sequence[int]], size: int) -> bytes:
        """The first `size` bytes of the digests of `experts`, by layer; empty until all are loaded."""
        wanted = [(layer, expert) for layer, chosen in experts.items() for expert in chosen]
        if not self._found.keys() >= set(wanted):
            return b""
        return b"".join(self._found[one][:size] for one in wanted)

    def save(self) -> None:
        """Record what was found, for the next start."""
        self._record.save(self._sampled, self._found)


def _sample(checkpoint: Checkpoint) -> str:
    started = time.perf_counter()
    fingerprint = sampled_fingerprint(checkpoint)
    log.info("sampled %s in %.1f s", checkpoint.folder, time.perf_counter() - started)
    return fingerprint
