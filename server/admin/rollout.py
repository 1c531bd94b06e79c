"""Other weights for a server that serves: a next generation beside the one that serves, calls shared, and one freed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import asdict, replace
from pathlib import Path

from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.experts import stored_dtypes
from expertd.kernels.weights.ledger import Ledger
from expertd.proto.base.errors import InvalidBatch, ModelMismatch
from expertd.server.admin.counting import counted
from expertd.server.admin.holdings import Change, Holdings
from expertd.server.admin.update import Progress
from expertd.server.scheduling.generations import Generation, Generations


class Rollout:
    """Changes the weights that a server answers with. Lives on the event loop.

    What fails raises an `ExpertdError`, and nothing has changed.
    """

    def __init__(self, holdings: Holdings) -> None:
        self._held = holdings

    async def stage(self, epoch: int, folder: str, fingerprint: str) -> AsyncGenerator[Progress, None]:
        """Take the weights in `folder` as the next generation, whose `fingerprint` this must be, if it is not empty."""
        with counted(self._held.metrics) as change:
            async with contextlib.aclosing(self._stage(epoch, folder, fingerprint, change)) as staging:
                async for progress in staging:
                    yield progress

    async def share(self, epoch: int, fingerprint: str, share: float) -> None:
        """Have this share of calls use the next generation."""
        with counted(self._held.metrics) as change:
            async with self._held.changing(epoch, change):
                held = self._held.generations
                if not 0.0 <= share <= 1.0:
                    raise InvalidBatch(f"share is {share}; it must be from 0 to 1")
                if held.next is None or held.next.fingerprint != fingerprint:
                    raise ModelMismatch(
                        f"model_fingerprint is {fingerprint!r}; the next generation is {_name(held.next)}"
                    )
                what = f"{share:g} of calls for weights {fingerprint}"
                await self._held.switch(replace(held, share=share), change, what)

    async def release(self, epoch: int, fingerprint: str) -> None:
        """Free the weights of a generation that no call should use."""
        with counted(self._held.metrics) as change:
            async with self._held.changing(epoch, change):
                left = _without(self._held.generations, fingerprint)
                await self._held.switch(left, change, f"weights {fingerprint} are released")

    async def _stage(self, epoch: int, folder: str, fingerprint: str, change: Change) -> AsyncGenerator[Progress, None]:
        async with self._held.changing(epoch, change):
            held = self._held.generations
            if held.next is not None:
                raise ModelMismatch(f"there is a next generation already, {_name(held.next)}: release it first")
            checkpoint = await asyncio.to_thread(_open, folder)
            try:
                source = await asyncio.to_thread(_generation, checkpoint, held.serving, fingerprint)
                arranged = self._held.arranged(held.serving.shard)
                making = self._held.make(source, source.shard.experts, {}, change.made, arranged)
                async with contextlib.aclosing(making):
                    async for progress in making:
                        yield Progress(progress)
                new = replace(
                    source, shard=replace(source.shard, keys=dict(change.made)), num_bytes=progress.total_bytes
                )
                what = f"weights {new.fingerprint} of {folder} are the next generation"
                overlap = await self._held.switch(Generations(held.serving, new), change, what)
            finally:
                if checkpoint not in [one.checkpoint for one in self._held.generations.all]:
                    checkpoint.close()
        yield Progress(progress, overlap)


def _open(folder: str) -> Checkpoint:
    try:
        return Checkpoint(Path(folder))
    except (InvalidConfig, CheckpointError, OSError, ValueError) as error:
        raise InvalidBatch(f"folder is {folder!r}: {error}") from error


def _generation(checkpoint: Checkpoint, serving: Generation, fingerprint: str) -> Generation:
    """What a checkpoint has for the experts that serve. Raises `InvalidBatch`, `ModelMismatch` or `CheckpointError`."""
    ours, theirs = asdict(serving.shard.config), asdict(checkpoint.config)
    for field, value in ours.items():
        if theirs[field] != value:
            raise InvalidBatch(f"folder {checkpoint.folder}: {field} is {theirs[field]}; that of the model is {value}")
    ledger = Ledger(checkpoint)
    if ledger.fingerprint == serving.fingerprint:
        raise InvalidBatch(f"folder {checkpoint.folder} holds the weights that serve, {serving.fingerprint}")
    if fingerprint not in ("", ledger.fingerprint):
        raise ModelMismatch(
            f"folder {checkpoint.folder} holds weights {ledger.fingerprint}; model_fingerprint is {fingerprint!r}"
        )
    shard = replace(serving.shard, model_fingerprint=ledger.fingerprint, keys={})
    return Generation(shard, checkpoint, ledger, stored_dtypes(checkpoint, shard.experts))


def _without(held: Generations, fingerprint: str) -> Generations:
    """Raises `ModelMismatch` where that is not here, alone, or wanted by calls."""
    if held.next is None or held.named(fingerprint) is None:
        known = " and ".join(one.fingerprint for one in held.all)
        raise ModelMismatch(f"model_fingerprint is {fingerprint!r}; of {known} one can be released beside another")
    kept, needed = (held.serving, 0.0) if fingerprint == held.next.fingerprint else (held.next, 1.0)
    if held.share != needed:
        raise ModelMismatch(
            f"weights {fingerprint} are for calls: the share of the next generation is {held.share:g}, not {needed:g}"
        )
    return Generations(kept)


def _name(generation: Generation | None) -> str:
    return "none" if generation is None else repr(generation.fingerprint)
