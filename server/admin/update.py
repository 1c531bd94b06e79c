"""Other experts for a server that serves: new layers made beside the old, one switch, and the old ones freed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from expertd._native import Engine
from expertd.kernels.model.ranges import format_ranges
from expertd.kernels.numerics.backend import Backend, UnsupportedShape
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.experts import layer_bytes, load_layer
from expertd.kernels.weights.ledger import Ledger
from expertd.proto.base.errors import InvalidBatch, Overloaded, ServerFault, StalePlacement, Unavailable
from expertd.server.admin.counting import counted
from expertd.server.scheduling.device import DeviceOwner
from expertd.server.scheduling.loading import read_again
from expertd.server.scheduling.selfcheck import SelfCheckFailed, self_check
from expertd.server.scheduling.shard import Shard
from expertd.server.telemetry.metrics import Metrics

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.01
"""Between two looks whether old weights are still used."""
Owned = Mapping[int, tuple[int, ...]]
"""Experts by layer."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an update is."""

    read_bytes: int
    total_bytes: int
    ready_layers: int
    total_layers: int
    overlap: float | None = None
    """At the end: seconds for which the old placement was used beside the new one."""


class Updater:
    """Changes what a server owns, one update at a time. Lives on the event loop."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ledger: Ledger,
        backend: Backend,
        device: DeviceOwner,
        engine: Engine,
        metrics: Metrics,
        switch: Callable[[Shard], None],
        shard: Shard,
    ) -> None:
        """`switch` has requests from then on checked against a shard, and tells everybody of it."""
        self.shard = shard
        """What is owned now."""
        self._checkpoint = checkpoint
        self._ledger = ledger
        self._backend = backend
        self._device = device
        self._engine = engine
        self._metrics = metrics
        self._tasks = metrics.new_tasks()
        self._switch = switch
        self.busy = False
        self._keys = itertools.count(1 + max(checkpoint.config.moe_layers))

    async def run(self, epoch: int, wanted: Owned) -> AsyncGenerator[Progress, None]:
        """Own `wanted` of its layers, and of all others what is owned at `epoch`.

        Raises `InvalidBatch`, `StalePlacement`, `Overloaded`, `Unavailable` or `ServerFault`; then, as when it is
        closed before the last `Progress`, nothing has changed.
        """
        with counted(self._metrics):
            async with contextlib.aclosing(self._run(epoch, wanted)) as updating:
                async for progress in updating:
                    yield progress

    async def _run(self, epoch: int, wanted: Owned) -> AsyncGenerator[Progress, None]:
        if self._engine.closed_because is not None:
            raise Unavailable(self._engine.closed_because)
        changed = self._changes(epoch, wanted)
        if self.busy:
            raise Overloaded("another update is running; wait for its end or cancel it")
        self.busy = True
        made: dict[int, int] = {}
        try:
            async for progress in self._make(changed, made):
                yield progress
            old, self.shard = self.shard, self._shard_with(changed, made)
            made = {}
            self._switch(self.shard)
            log.info("epoch %d: %s", self.shard.placement_epoch, words(changed))
            # Whoever waits may leave; the old weights go nevertheless.
            switched = time.monotonic()
            await asyncio.shield(self._tasks.start(self._retire(old), "freeing weights"))
            done = replace(progress, overlap=time.monotonic() - switched)
        except UnsupportedShape as error:
            raise InvalidBatch(f"nothing was changed: {error}") from error
        except (CheckpointError, SelfCheckFailed, RuntimeError) as error:
            # Such as a GPU without memory.
            raise ServerFault(f"nothing was changed: {error}") from error
        finally:
            self.busy = False
            for key in made.values():
                await self._device.call(partial(self._backend.drop_layer, key))
        yield done

    def _changes(self, epoch: int, wanted: Owned) -> dict[int, tuple[int, ...]]:
        """What is wanted of the layers that are to change. Raises `InvalidBatch` or `StalePlacement`."""
        current, model = self._engine.placement.epoch, self.shard.config
        if epoch != current:
            raise StalePlacement(f"placement_epoch is {epoch}; the current one is {current}")
        strangers = [layer for layer in wanted if layer not in model.moe_layers]
        if strangers:
            raise InvalidBatch(
                f"layers holds {strangers[0]}; the model's MoE layers are {format_ranges(model.moe_layers)}"
            )
        for layer, experts in wanted.items():
            if list(experts) != sorted(set(experts)):
                raise InvalidBatch(f"experts of layer {layer} are {list(experts)}; they must ascend")
            if experts and experts[-1] >= model.n_routed_experts:
                raise InvalidBatch(
                    f"experts of layer {layer} hold {experts[-1]}; the model's are 0-{model.n_routed_experts - 1}"
                )
        changed = {layer: experts for layer, experts in wanted.items() if experts != self.shard.experts.get(layer, ())}
        if not changed:
            raise InvalidBatch("layers name nothing that would change")
        return changed

    async def _make(self, changed: Owned, made: dict[int, int]) -> AsyncGenerator[Progress, None]:
        """Have the backend make the new layers, whose keys are put into `made`, and check them."""
        added = {layer: self._missing(layer, experts) for layer, experts in changed.items()}
        dtype = self.shard.weight_dtype
        total = sum(layer_bytes(self._checkpoint, layer, experts, dtype) for layer, experts in added.items())
        await self._check_memory(changed)
        read = [0]

        def advance(size: int) -> None:
            read[0] += size
            self._metrics.update_bytes.inc(size)

        yield Progress(0, total, 0, len(changed))
        for ready, (layer, experts) in enumerate(changed.items(), 1):
            if experts:
                loading = partial(
                    load_layer, self._checkpoint, layer, added[layer], advance, self._ledger.settle, dtype
                )
                weights = await asyncio.to_thread(loading)
                key = made[layer] = next(self._keys)
                base, kept = self._base(layer, experts)
                await asyncio.to_thread(self._backend.splice_layer, key, base, kept, weights)
                sample = await asyncio.to_thread(read_again, self._checkpoint, layer, experts, dtype, added[layer])
                await self._device.call(partial(self_check, self._backend, key, sample, serving=True))
            yield Progress(read[0], total, ready, len(changed))
        await asyncio.to_thread(self._ledger.save)

    def _missing(self, layer: int, experts: tuple[int, ...]) -> tuple[int, ...]:
        """Those that are not here yet."""
        here = self.shard.experts.get(layer, ())
        return tuple(expert for expert in experts if expert not in here)

    def _base(self, layer: int, experts: tuple[int, ...]) -> tuple[int | None, dict[int, int]]:
        """The key of the layer to copy from, None when it is not here; and for the positions in `experts` of those
        that are here the ones in it."""
        if layer not in self.shard.experts:
            return None, {}
        places = {expert: place for place, expert in enumerate(self.shard.experts[layer])}
        kept = {place: places[expert] for place, expert in enumerate(experts) if expert in places}
        return self.shard.key(layer), kept

    async def _check_memory(self, changed: Owned) -> None:
        memory = await self._device.call(self._backend.memory)
        if memory is None:
            return
        most = max(map(len, self.shard.experts.values()), default=0)
        size = self.shard.config.expert_bytes * self.shard.weight_dtype.itemsize
        needed = size * sum(max(most, len(experts)) for experts in changed.values() if experts)
        left = memory.free + memory.reserved - memory.allocated
        if needed > left:
            raise Overloaded(
                f"{len(changed)} new layers take {needed} bytes beside the old ones and {left} are free;"
                " update fewer layers at once"
            )

    def _shard_with(self, changed: Owned, made: Mapping[int, int]) -> Shard:
        experts, keys = {**self.shard.experts, **changed}, {**self.shard.keys, **made}
        owned = {layer: experts[layer] for layer in sorted(experts) if experts[layer]}
        epoch = max(time.time_ns() // 1000, self._engine.placement.epoch + 1)
        keys = {layer: key for layer, key in keys.items() if layer in owned}
        return replace(self.shard, placement_epoch=epoch, experts=owned, keys=keys)

    async def _retire(self, old: Shard) -> None:
        """Free the layers of `old` that are not in use any more."""
        while self._engine.uses_before(self.shard.placement_epoch):
            await asyncio.sleep(LOOK_SECONDS)
        serving = {self.shard.key(layer) for layer in self.shard.experts}
        for layer in old.experts:
            if old.key(layer) not in serving:
                await self._device.call(partial(self._backend.drop_layer, old.key(layer)))


def words(experts: Owned) -> str:
    """For the log."""
    return "; ".join(f"layer {layer}: {format_ranges(owned) or 'none'}" for layer, owned in experts.items())
