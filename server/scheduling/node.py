"""The devices of a server, over which the experts of every layer are spread, as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, TypeVar

import torch

from expertd._native import Executor, Failpoints, NodeExecutor, peer_adder
from expertd.kernels.model.spread import Held, even_room, respread, spread
from expertd.kernels.numerics.backend import Backend, DeviceMemory, LayerAddresses, LayerWeights, UnsupportedShape
from expertd.kernels.weights.experts import ExpertMatrices
from expertd.proto.base.errors import StalePlacement, Unavailable
from expertd.server.options.config import InvalidOption
from expertd.server.scheduling.device import DeviceOwner
from expertd.server.scheduling.selfcheck import self_check

T = TypeVar("T")
Loads: TypeAlias = Mapping[int, Sequence[float]]
"""By layer, of every expert of the model."""


@dataclass(eq=False)
class Device:
    """A backend, with the threads that call it."""

    number: int
    """As --devices has it."""
    backend: Backend
    owner: DeviceOwner = field(init=False)
    lost: str | None = None
    """Why it computes nothing any more."""
    hangs: bool = False
    """Whether it is lost and may yet use what it was given."""
    weights: dict[int, int] = field(default_factory=dict)
    """By layer's key, bytes of the experts that it has."""
    _loss: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.owner = DeviceOwner(self.backend, "" if self.number == 0 else f"-{self.number}")

    def lose(self, reason: str) -> None:
        self.lost = reason
        self._loss.set()

    async def outcome(self, work: asyncio.Future[T]) -> T:
        """Of what threads have the backend do, which goes on without whoever waits for it. Raises `Unavailable` when
        the device is lost before."""
        loss = asyncio.ensure_future(self._loss.wait())
        try:
            await asyncio.wait((work, loss), return_when=asyncio.FIRST_COMPLETED)
        finally:
            loss.cancel()
            work.add_done_callback(asyncio.Future.exception)
        if not work.done():
            raise Unavailable(f"device {self.number} was lost meanwhile: {self.lost}")
        return work.result()


class Node:
    """What loads, checks and computes layers on one device or on several. Lives on the event loop.

    Layers are known by keys. Each layer of several devices has the same `room` for experts on each.
    """

    def __init__(
        self, backends: Mapping[int, Backend], most: int, room: int | None = None, loads: Loads | None = None
    ) -> None:
        """`most`: experts of a layer at the start. `room`: None for their even share. Raises `InvalidOption`."""
        self.devices = tuple(Device(number, backend) for number, backend in backends.items())
        self.held: dict[int, Held] = {}
        """By layer's key."""
        self.room = room or even_room(most, len(self.devices))
        """For experts of a layer, of each device."""
        self._loads = loads or {}
        if self.room * len(self.devices) < most:
            raise InvalidOption(
                f"--device-experts {room}: {len(self.devices)} devices have room for {self.room * len(self.devices)} of"
                f" {most} experts"
            )
        self._executor: NodeExecutor | None = None

    @property
    def name(self) -> str:
        """Of the hardware, for people."""
        name = self.devices[0].backend.device
        return name if len(self.devices) == 1 else f"{len(self.devices)} x {name}"

    @property
    def num_bytes(self) -> int:
        """Of all experts that sound devices have, each copy. Asked on any thread."""
        # A list is made in one step; the dictionary may change between two.
        return sum(sum(list(device.weights.values())) for device in self.sound)

    @property
    def sound(self) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.lost is None)

    @property
    def chores(self) -> DeviceOwner:
        """Threads for what is done for all devices alike."""
        return (self.sound or self.devices)[0].owner

    @property
    def executor(self) -> NodeExecutor | None:
        """What spreads batches over several devices, once that has begun."""
        return self._executor

    def start(self) -> None:
        for device in self.devices:
            device.owner.start()

    def stop(self) -> None:
        for device in self.devices:
            device.owner.stop()

    def assign(self, layer: int, experts: Sequence[int]) -> Held:
        """Decide who has which experts of a layer that is to be loaded."""
        held = self.held[layer] = self._spread(layer, experts)
        return held

    def arrange(self, experts: Sequence[int], chosen: Mapping[int, Sequence[int]]) -> Held:
        """Who has which experts of a layer where that is `chosen`, by the numbers of sound devices. Raises
        `UnsupportedShape`."""
        strangers = set(chosen) - {device.number for device in self.sound}
        if strangers:
            raise UnsupportedShape(f"devices name {min(strangers)}, which computes nothing here")
        room = self.room_for(experts)
        for number, its in chosen.items():
            if len(its) > room or list(its) != sorted(set(its)):
                raise UnsupportedShape(f"device {number} is to have {list(its)}; they must ascend, {room} at most")
        if set().union(*chosen.values()) != set(experts):
            raise UnsupportedShape(f"devices are to have other experts than {list(experts)}")
        return tuple(tuple(chosen.get(device.number, ())) for device in self.devices)

    def arrangement(self, key: int) -> Held:
        """The experts that each device computes of a layer."""
        return tuple(() if device.lost else its for device, its in zip(self.devices, self.held[key], strict=True))

    def lacking(self, base: int | None, held: Held) -> tuple[int, ...]:
        """The experts of `held` that a device does not have of layer `base`."""
        before = self._before(base)
        new = (expert for its, had in zip(held, before, strict=True) for expert in its if expert not in had)
        return tuple(sorted({*new}))

    def room_for(self, experts: Sequence[int]) -> int:
        """How many of a layer's experts each device can have."""
        # One device says by itself how many it takes.
        return len(experts) if len(self.devices) == 1 else self.room

    async def load(self, key: int, experts: Sequence[int], weights: LayerWeights) -> None:
        """Take an assigned layer from host memory, each device its experts, all at once. Raises `UnsupportedShape`."""
        await asyncio.gather(
            *(
                device.owner.call(partial(device.backend.load_layer, key, part_of(weights, places(experts, its))))
                for device, its in zip(self.devices, self.held[key], strict=True)
            )
        )
        for device, its in zip(self.devices, self.held[key], strict=True):
            device.weights[key] = len(its) * weights.expert_bytes

    async def splice(
        self,
        key: int,
        layer: int,
        base: int | None,
        experts: Sequence[int],
        added: Sequence[int],
        weights: LayerWeights,
        held: Held | None = None,
    ) -> None:
        """Make another layer, of `experts`: what is not `added`, as `weights`, is `base`'s. Beside everything else.

        `held` says who is to have which, where that was decided. Raises `UnsupportedShape`; `StalePlacement` when a
        device was lost since `added` was read, `Unavailable` when one is lost meanwhile.
        """
        sound = [place for place, device in enumerate(self.devices) if device.lost is None]
        before = self._before(base)
        try:
            if held is None and base is None and len(sound) == len(self.devices):
                held = self._spread(layer, experts)
            elif held is None:
                held = respread(before, experts, self.room_for(experts), sound)
        except ValueError as error:
            raise UnsupportedShape(str(error)) from None
        self.held[key] = held
        for place in sound:
            its, had = held[place], before[place]
            if not its:
                continue
            kept = {at: had.index(expert) for at, expert in enumerate(its) if expert in had}
            lacks = [expert for expert in its if expert not in had]
            if not set(lacks) <= set(added):
                raise StalePlacement(f"layer {layer}: a device was lost meanwhile with experts that are to stay")
            new = part_of(weights, places(added, lacks))
            splice = partial(self.devices[place].backend.splice_layer, key, base if kept else None, kept, new)
            making = asyncio.get_running_loop().run_in_executor(None, splice)
            await _to_its_end(asyncio.create_task(self.devices[place].outcome(making)))
            self.devices[place].weights[key] = len(its) * weights.expert_bytes

    async def drop(self, key: int) -> None:
        """Forget a layer, which no batch uses any more."""
        self.held.pop(key, None)
        await self.each(lambda backend: backend.drop_layer(key))
        for device in self.devices:
            device.weights.pop(key, None)

    async def each(self, ask: Callable[[Backend], T]) -> dict[int, T]:
        """What sound devices say, by their numbers, but for those that are lost before they say it."""
        asked = {device: device.owner.call(partial(ask, device.backend)) for device in self.sound}
        said = {}
        for device, answer in asked.items():
            with contextlib.suppress(Unavailable):
                said[device.number] = await device.outcome(answer)
        return said

    def shares(self, key: int, among: Sequence[int]) -> list[list[int]]:
        """Of the experts `among` a layer's, those of each device."""
        return [[expert for expert in its if expert in among] for its in self.held[key]]

    async def check(self, key: int, sample: Mapping[int, ExpertMatrices], *, serving: bool = False) -> float:
        """The largest error of a layer's experts, on every device that has them. Raises `SelfCheckFailed`, and
        `Unavailable` when a device is lost meanwhile."""
        worst = 0.0
        # One after another: they may capture graphs.
        for device, its in zip(self.devices, self.held[key], strict=True):
            there = {its.index(expert): matrices for expert, matrices in sample.items() if expert in its}
            if there and device.lost is None:
                check = partial(self_check, device.backend, key, there, serving=serving)
                worst = max(worst, await device.outcome(device.owner.call(check)))
        return worst

    async def warm_up(self) -> None:
        # One after another: what the first one compiles, others find.
        for device in self.devices:
            await device.owner.call(device.backend.warm_up)
            if len(self.devices) > 1:
                await device.owner.call(partial(device.backend.prepare_adding, len(self.devices)))

    async def memory(self) -> dict[int, DeviceMemory]:
        """By the numbers of those devices that have memory of their own."""
        found = await self.each(lambda backend: backend.memory())
        return {number: memory for number, memory in found.items() if memory is not None}

    async def count_usable(self) -> list[int]:
        """Bytes that new tensors can have, of each of those devices."""
        found = await self.each(lambda backend: backend.count_usable())
        return [size for size in found.values() if size is not None]

    async def begin(self, failpoints: Failpoints | None) -> Executor:
        """What an engine is to use, now that all is loaded."""
        executors = [await _executor_of(device) for device in self.devices]
        if len(executors) == 1:
            return executors[0]
        self._executor = NodeExecutor(executors, failpoints, peer_adder(executors))
        return self._executor

    def parts(self, key: int) -> list[tuple[tuple[int, ...], LayerAddresses]]:
        """By device, the experts that it computes of a layer, and where it has them."""
        return [
            (its, device.backend.layer_addresses(key))
            for device, its in zip(self.devices, self.arrangement(key), strict=True)
        ]

    def computable(self, key: int) -> set[int]:
        """The experts of a layer that a sound device has."""
        return {expert for its in self.arrangement(key) for expert in its}

    def check_sign(self, device: Device) -> None:
        """Raise what a device met."""
        device.backend.synchronize()
        if self._executor is not None:
            self._executor.check(self.devices.index(device))

    def lose(self, device: Device, reason: str) -> None:
        """From now on a device computes nothing."""
        device.lose(reason)

    def forsake(self, device: Device, *, hangs: bool) -> None:
        """Have nothing computed on a lost device any more, once nobody is told of it any more."""
        device.hangs = device.hangs or hangs
        if self._executor is not None:
            self._executor.lose(self.devices.index(device), hangs=hangs)

    def _before(self, base: int | None) -> Held:
        return ((),) * len(self.devices) if base is None else self.held[base]

    def _spread(self, layer: int, experts: Sequence[int]) -> Held:
        loads = self._loads.get(layer)
        return spread(
            experts,
            len(self.devices),
            self.room_for(experts),
            None if loads is None else [loads[expert] for expert in experts],
        )


async def _to_its_end(work: asyncio.Task[T]) -> T:
    """Its result. Who is cancelled waits for its end nevertheless: a thread goes on, and what it makes can be dropped
    only then."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait((work,))
        raise


async def _executor_of(device: Device) -> Executor:
    native = device.backend.native_executor()
    return device.owner.batches if native is None else await device.owner.call(native.take)


def places(experts: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """Where among `experts` those that are `chosen` are."""
    at = {expert: place for place, expert in enumerate(experts)}
    return [at[expert] for expert in chosen]


def part_of(weights: LayerWeights, chosen: Sequence[int]) -> LayerWeights:
    """The experts at these places, without copying them where they are a run."""
    run = bool(chosen) and list(chosen) == list(range(chosen[0], chosen[0] + len(chosen)))
    which = slice(chosen[0], chosen[0] + len(chosen)) if run else torch.tensor(chosen, dtype=torch.long)
    return LayerWeights(*(_indexed(tensor, which) for tensor in weights.tensors), swiglu_limit=weights.swiglu_limit)


def _indexed(tensor: torch.Tensor, which: slice | torch.Tensor) -> torch.Tensor:
    # As bytes: not every type of weights can be indexed.
    return tensor[which] if isinstance(which, slice) else tensor.view(torch.uint8)[which].view(tensor.dtype)
