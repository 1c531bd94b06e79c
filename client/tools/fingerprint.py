"""`expertd fingerprint`: make the manifest of a checkpoint, or compare a checkpoint with one."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.files import write_text
from expertd.kernels.weights.manifest import MANIFEST, Manifest

SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="FOLDER", help="folder of the checkpoint")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--output", type=Path, help=f"file to write (default: {MANIFEST} in the folder)")
    action.add_argument("--check", type=Path, metavar="MANIFEST", help="compare the checkpoint with this manifest")


def run(arguments: argparse.Namespace) -> int:
    """0 when the manifest is written or the checkpoint is what it says, 1 when not, 2 when that is not known."""
    try:
        said = None if arguments.check is None else Manifest.read(arguments.check)
        with Checkpoint(arguments.model) as checkpoint:
            found = _read(checkpoint)
            if said is not None:
                return _compare(said, found, checkpoint, arguments.check)
        return _write(found, arguments.output or arguments.model / MANIFEST)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except (CheckpointError, InvalidConfig, OSError) as error:
        print(f"expertd fingerprint: error: {error}", file=sys.stderr)
        return 2


def _read(checkpoint: Checkpoint) -> Manifest:
    size = sum(checkpoint.find(name).num_bytes for name in checkpoint.moe_tensors)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    started = time.perf_counter()
    with Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as bar:
        manifest = Manifest.of(checkpoint, partial(bar.advance, bar.add_task("", total=size)))
    seconds = time.perf_counter() - started
    print(
        f"{checkpoint.folder}: {sum(map(len, manifest.experts.values()))} experts and {len(manifest.gates)} tensors of"
        f" gates, {size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s",
        file=sys.stderr,
    )
    return manifest


def _write(manifest: Manifest, path: Path) -> int:
    if path.exists() and Manifest.read(path).fingerprint != manifest.fingerprint:
        # Who trusts a manifest must not find another in its place.
        raise CheckpointError(f"{path} is of another content: look at it with --check, or remove it")
    write_text(manifest.text, path)
    print(f"{manifest.fingerprint}  {path}")
    return 0


def _compare(said: Manifest, found: Manifest, checkpoint: Checkpoint, path: Path) -> int:
    differences = [*said.config_differences(checkpoint.config), *said.differences(found)]
    for difference in differences[:SHOWN]:
        print(f"differs: {difference}")
    if len(differences) > SHOWN:
        print(f"and {len(differences) - SHOWN} more")
    verdict = "FAILED" if differences else "OK"
    print(f"{verdict}: {len(differences)} differences between {checkpoint.folder} and {path}, {said.fingerprint}")
    return 1 if differences else 0
