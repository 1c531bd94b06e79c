"""What a server answers with, and how it becomes something else: made beside it, one switch, and the rest freed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from expertd._native import Engine
from expertd.kernels.model.spread import Held, even_room
from expertd.kernels.numerics.backend import UnsupportedShape
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.experts import layer_bytes, load_layer
from expertd.proto.base.errors import ExpertdError, InvalidBatch, Overloaded, ServerFault, StalePlacement, Unavailable
from expertd.proto.codec import UpdateProgress
from expertd.server.scheduling.generations import Generation, Generations
from expertd.server.scheduling.loading import read_again
from expertd.server.scheduling.node import Device, Node
from expertd.server.scheduling.selfcheck import SelfCheckFailed
from expertd.server.scheduling.shard import Shard
from expertd.server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.01
"""Between two looks whether old weights are still used."""
Owned = Mapping[int, tuple[int, ...]]
"""Experts by layer."""
Arranged = Mapping[int, Held]
"""By layer, which devices have which experts."""
Chosen = Mapping[int, Mapping[int, tuple[int, ...]]]
"""By layer, experts by the number of the device that is to have them."""
Made = dict[int, int]
"""By layer, what the backend knows a new one by."""


@dataclass(eq=False)
class Change:
    """One of what is held."""

    made: Made = field(default_factory=dict)
    switched: bool = False
    """Whether requests are answered with it."""


class Holdings:
    """The generations of a server, of which one change is made at a time. Lives on the event loop."""

    def __init__(
        self,
        generations: Generations,
        node: Node,
        engine: Engine,
        metrics: Metrics,
        tell: Callable[[Generations], None],
    ) -> None:
        """`tell` has requests from then on checked against generations, and tells everybody of them."""
        self.generations = generations
        self.metrics = metrics
        self.busy = False
        self.progress: UpdateProgress | None = None
        """Of what is made now."""
        self._node = node
        self._engine = engine
        self._tell = tell
        self._tasks = metrics.new_tasks()
        self._keys = itertools.count(1 + max(generations.serving.shard.config.moe_layers))

    @property
    def epoch(self) -> int:
        """The current one."""
        return self._engine.placement.epoch

    @contextlib.asynccontextmanager
    async def changing(self, epoch: int, change: Change) -> AsyncIterator[None]:
        """Around a change of what is held at `epoch`. Layers that were made and are not held after it are dropped.

        Raises `StalePlacement`, `Overloaded`, `Unavailable` or `ServerFault`, and what is raised within.
        """
        if self._engine.closed_because is not None:
            raise Unavailable(self._engine.closed_because)
        if epoch != self.epoch:
            raise StalePlacement(f"placement_epoch is {epoch}; the current one is {self.epoch}")
        if self.busy:
            raise Overloaded("another update is running; wait for its end or cancel it")
        self.busy = True
        try:
            yield
        except ExpertdError:
            # Some are an `OSError`, too.
            raise
        except UnsupportedShape as error:
            raise InvalidBatch(f"nothing was changed: {error}") from error
        except (CheckpointError, SelfCheckFailed, RuntimeError, OSError) as error:
            # Such as a GPU without memory, or a folder that is gone.
            what = "the change was made, and what it gave up is not freed" if change.switched else "nothing was changed"
            raise ServerFault(f"{what}: {error}") from error
        finally:
            self.busy, self.progress = False, None
            for key in set(change.made.values()) - self.generations.keys:
                await self._drop(key)

    async def make(
        self, source: Generation, changed: Owned, here: Owned, made: Made, arranged: Arranged
    ) -> AsyncGenerator[UpdateProgress, None]:
        """Have the backend make the layers of `changed`, whose keys are put into `made`, and check them: of `source`'s
        files, but for what is `here` of its layers. What is not `arranged` the node spreads."""
        checkpoint, dtype = source.checkpoint, source.shard.weight_dtype
        bases = {layer: source.shard.key(layer) if layer in here else None for layer in changed}
        added = {
            layer: self._node.lacking(bases[layer], arranged[layer])
            if layer in arranged
            else _without(experts, here.get(layer, ()))
            for layer, experts in changed.items()
        }
        total = await asyncio.to_thread(_count_bytes, source, added)
        await self._check_memory(changed)
        read = [0]

        def advance(size: int) -> None:
            read[0] += size
            self.metrics.update_bytes.inc(size)

        self.progress = UpdateProgress(0, total, 0, len(changed))
        yield self.progress
        for ready, (layer, experts) in enumerate(changed.items(), 1):
            if experts:
                loading = partial(load_layer, checkpoint, layer, added[layer], advance, source.ledger.settle, dtype)
                weights = await asyncio.to_thread(loading)
                key = made[layer] = next(self._keys)
                held = arranged.get(layer)
                await self._node.splice(key, layer, bases[layer], experts, added[layer], weights, held)
                shares = self._node.shares(key, added[layer] or experts)
                sample = await asyncio.to_thread(read_again, checkpoint, layer, shares, dtype)
                await self._node.check(key, sample, serving=True)
            self.progress = UpdateProgress(read[0], total, ready, len(changed))
            yield self.progress
        await asyncio.to_thread(source.ledger.save)

    def arrange(self, wanted: Owned, chosen: Chosen) -> Arranged:
        """`wanted` of layers as is `chosen` for them. Raises `UnsupportedShape`."""
        return {layer: self._node.arrange(wanted[layer], its) for layer, its in chosen.items()}

    def arranged(self, shard: Shard) -> Arranged:
        """As it is of all layers of a shard that is held."""
        return {layer: self._node.arrangement(shard.key(layer)) for layer in shard.layers}

    async def switch(self, generations: Generations, change: Change, what: str) -> float:
        """Answer with other ones from now on; `what` that means is for the log. When nobody uses what is not among them
        any more, it is freed, and the seconds until then are returned; whoever waits may leave before."""
        former = self.generations
        self._begin(generations)
        change.switched = True
        log.info("epoch %d: %s", self.epoch, what)
        switched = time.monotonic()
        # By now: what a later switch gives up, requests of this one may use.
        gone, closed = former.keys - self.generations.keys, former.checkpoints - self.generations.checkpoints
        await asyncio.shield(self._tasks.start(self._retire(self.epoch, gone, closed), "freeing weights"))
        return time.monotonic() - switched

    def lose(self, device: Device, reason: str, *, hangs: bool) -> None:
        """Answer without a device from now on: experts that no other one has are not owned any more."""
        self._node.lose(device, reason)
        self._begin(self.generations)
        self._node.forsake(device, hangs=hangs)

    def _begin(self, generations: Generations) -> None:
        # Devices may have been lost since somebody began to make these.
        left = generations.only(self._node.computable)
        self.generations = left.at(max(time.time_ns() // 1000, self.epoch + 1))
        self.metrics.layers_loaded.set(len(self.generations.serving.shard.layers))
        self._tell(self.generations)

    async def _retire(self, epoch: int, keys: set[int], checkpoints: set[Checkpoint]) -> None:
        """Free what placements before that of `epoch` had."""
        while self._engine.uses_before(epoch):
            await asyncio.sleep(LOOK_SECONDS)
        for key in keys:
            await self._drop(key)
        for checkpoint in checkpoints:
            checkpoint.close()

    async def _drop(self, key: int) -> None:
        await self._node.drop(key)

    async def _check_memory(self, changed: Owned) -> None:
        usable = await self._node.count_usable()
        if not usable:
            return
        shard = self.generations.serving.shard
        size = shard.config.expert_bytes * shard.weight_dtype.itemsize
        count, room = len(self._node.sound), self._node.room
        needed = size * sum(max(room, even_room(len(experts), count)) for experts in changed.values() if experts)
        left = min(usable)
        if needed > left:
            raise Overloaded(
                f"{len(changed)} new layers take {needed} bytes beside the old ones and {left} are free; change the"
                " experts of fewer layers at once, and give other weights to servers that are started anew"
            )


def _count_bytes(source: Generation, experts: Owned) -> int:
    """That are read for them. Raises `CheckpointError`."""
    dtype = source.shard.weight_dtype
    return sum(layer_bytes(source.checkpoint, layer, its, dtype) for layer, its in experts.items())


def _without(experts: tuple[int, ...], here: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(expert for expert in experts if expert not in here)
