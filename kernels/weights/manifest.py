"""The manifest: a file with the digest of every expert and gate of a model, which its owner can sign."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertd.kernels.model.config import MoeConfig
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError, StoredTensor
from expertd.kernels.weights.digests import expert_digest, read_digest
from expertd.kernels.weights.experts import expert_tensors

MANIFEST = "expertd.manifest.json"
FORMAT = 1
READERS = 16
"""Threads that read and hash at once."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a model consists of, however it is split into files. The same model gives the same bytes."""

    config: Mapping[str, Any]
    """The fields of `MoeConfig`."""
    gates: Mapping[str, str]
    """Tensor -> `tensor_digest` in hex."""
    experts: Mapping[int, tuple[str, ...]]
    """Layer -> `expert_digest` in hex of each expert."""
    fingerprint: str
    """SHA-256 of the file: what `sha256sum` prints of it."""

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises `CheckpointError` for a file that is no manifest."""
        try:
            content = path.read_bytes()
            fields = json.loads(content)
            if fields["format"] != FORMAT:
                raise CheckpointError(f"{path}: format {fields['format']}, expected {FORMAT}: make it again")
            experts = {int(layer): tuple(map(_checked, digests)) for layer, digests in fields["experts"].items()}
            gates = {name: _checked(digest) for name, digest in fields["gates"].items()}
            return cls(dict(fields["config"]), gates, experts, hashlib.sha256(content).hexdigest())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: expected a manifest of 'expertd fingerprint', found: {error!r}") from None

    @classmethod
    def of(cls, checkpoint: Checkpoint, on_bytes: Callable[[int], None]) -> Manifest:
        """Read and hash every expert and gate of a checkpoint. Raises `CheckpointError`."""
        config = checkpoint.config

        def digest(stored: StoredTensor) -> bytes:
            found = read_digest(checkpoint, stored)
            on_bytes(stored.num_bytes)
            return found

        with ThreadPoolExecutor(READERS, thread_name_prefix="digests") as readers:
            experts = {
                layer: tuple(
                    readers.map(
                        lambda tensors: expert_digest(map(digest, tensors)).hex(),
                        [expert_tensors(checkpoint, layer, expert) for expert in range(config.n_routed_experts)],
                    )
                )
                for layer in config.moe_layers
            }
            gates = gate_tensors(checkpoint)
            found = {stored.name: found.hex() for stored, found in zip(gates, readers.map(digest, gates), strict=True)}
        return cls.from_content(json.loads(json.dumps(config.fields)), found, experts)

    @classmethod
    def from_content(
        cls, config: Mapping[str, Any], gates: Mapping[str, str], experts: Mapping[int, tuple[str, ...]]
    ) -> Manifest:
        """With the fingerprint of the file that `text` is."""
        unnamed = cls(config, gates, experts, "")
        return dataclasses.replace(unnamed, fingerprint=hashlib.sha256(unnamed.text.encode()).hexdigest())

    @property
    def text(self) -> str:
        """The content of the file."""
        fields = {
            "format": FORMAT,
            "config": dict(sorted(self.config.items())),
            "gates": dict(sorted(self.gates.items())),
            "experts": {str(layer): self.experts[layer] for layer in sorted(self.experts)},
        }
        return json.dumps(fields, indent=1) + "\n"

    def digest(self, layer: int, expert: int) -> bytes | None:
        """What an expert must have; None when the manifest lacks it."""
        digests = self.experts.get(layer, ())
        return bytes.fromhex(digests[expert]) if expert < len(digests) else None

    def config_differences(self, config: MoeConfig) -> Iterator[str]:
        """Fields of `config` that are others in the manifest; those that it does not know are not compared."""
        for name, value in json.loads(json.dumps(config.fields)).items():
            if name in self.config and self.config[name] != value:
                yield f"{name}: {value} here, {self.config[name]} in the manifest"

    def differences(self, other: Manifest) -> Iterator[str]:
        """Experts and gates of which the two do not say the same."""
        for layer in sorted(self.experts.keys() | other.experts.keys()):
            ours, theirs = self.experts.get(layer, ()), other.experts.get(layer, ())
            for expert in range(max(len(ours), len(theirs))):
                if ours[expert : expert + 1] != theirs[expert : expert + 1]:
                    yield f"layer {layer}, expert {expert}"
        names = sorted({*self.gates, *other.gates})
        yield from (name for name in names if self.gates.get(name) != other.gates.get(name))


def gate_tensors(checkpoint: Checkpoint) -> list[StoredTensor]:
    """Weights and correction biases of all gates."""
    return [checkpoint.find(name) for name in checkpoint.moe_tensors if ".experts." not in name]


def _checked(digest: str) -> str:
    if len(bytes.fromhex(digest)) != hashlib.sha256().digest_size:
        raise ValueError(f"{digest!r} is no SHA-256")
    return digest
