"""Other experts for a server that serves."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from expertd.kernels.model.ranges import format_ranges
from expertd.proto.base.errors import InvalidBatch, ModelMismatch
from expertd.proto.codec import UpdateProgress
from expertd.server.admin.counting import counted
from expertd.server.admin.holdings import Arranged, Change, Chosen, Holdings, Made, Owned
from expertd.server.scheduling.generations import Generations
from expertd.server.scheduling.shard import Shard


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an update is."""

    made: UpdateProgress
    overlap: float | None = None
    """At the end: seconds for which the old placement was used beside the new one."""


class Updater:
    """Changes what a server owns, one update at a time. Lives on the event loop."""

    def __init__(self, holdings: Holdings) -> None:
        self._held = holdings

    async def run(self, epoch: int, wanted: Owned, chosen: Chosen) -> AsyncGenerator[Progress, None]:
        """Own `wanted` of its layers, on devices as is `chosen` for some, and of all others what is owned at `epoch`.

        Raises `InvalidBatch`, `StalePlacement`, `ModelMismatch`, `Overloaded`, `Unavailable` or `ServerFault`; then, as
        when it is closed before all layers are ready, nothing has changed. When it is closed later, all may have.
        """
        with counted(self._held.metrics) as change:
            async with contextlib.aclosing(self._run(epoch, wanted, chosen, change)) as updating:
                async for progress in updating:
                    yield progress

    async def _run(self, epoch: int, wanted: Owned, chosen: Chosen, change: Change) -> AsyncGenerator[Progress, None]:
        async with self._held.changing(epoch, change):
            serving = self._held.generations.serving
            if self._held.generations.next is not None:
                raise ModelMismatch("there are two generations of weights; release one before experts move")
            _check(serving.shard, wanted)
            arranged = self._held.arrange(wanted, chosen)
            changed = _changes(serving.shard, wanted, self._held.arranged(serving.shard), arranged)
            making = self._held.make(serving, changed, serving.shard.experts, change.made, arranged)
            async with contextlib.aclosing(making):
                async for progress in making:
                    yield Progress(progress)
            shard = _with(serving.shard, changed, change.made)
            overlap = await self._held.switch(Generations(replace(serving, shard=shard)), change, words(changed))
        yield Progress(progress, overlap)


def _check(shard: Shard, wanted: Owned) -> None:
    """Raise `InvalidBatch` for layers and experts that the model does not have."""
    model = shard.config
    strangers = [layer for layer in wanted if layer not in model.moe_layers]
    if strangers:
        raise InvalidBatch(f"layers holds {strangers[0]}; the model's MoE layers are {format_ranges(model.moe_layers)}")
    for layer, experts in wanted.items():
        if list(experts) != sorted(set(experts)):
            raise InvalidBatch(f"experts of layer {layer} are {list(experts)}; they must ascend")
        if experts and experts[-1] >= model.n_routed_experts:
            raise InvalidBatch(
                f"experts of layer {layer} hold {experts[-1]}; the model's are 0-{model.n_routed_experts - 1}"
            )


def _changes(shard: Shard, wanted: Owned, now: Arranged, then: Arranged) -> dict[int, tuple[int, ...]]:
    """What is wanted of the layers that are to change. Raises `InvalidBatch`."""
    changed = {
        layer: experts
        for layer, experts in wanted.items()
        if experts != shard.experts.get(layer, ()) or (layer in then and then[layer] != now.get(layer))
    }
    if not changed:
        raise InvalidBatch("layers name nothing that would change")
    return changed


def _with(shard: Shard, changed: Owned, made: Made) -> Shard:
    experts, keys = {**shard.experts, **changed}, {**shard.keys, **made}
    owned = {layer: experts[layer] for layer in sorted(experts) if experts[layer]}
    return replace(shard, experts=owned, keys={layer: key for layer, key in keys.items() if layer in owned})


def words(experts: Owned) -> str:
    """For the log."""
    return "; ".join(f"layer {layer}: {format_ranges(owned) or 'none'}" for layer, owned in experts.items())
