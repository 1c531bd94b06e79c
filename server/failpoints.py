"""Faults on purpose, for tests: asked for by the environment of a starting process, out of reach of every RPC.

    EXPERTD_FAILPOINTS="delay=0.2:0.05,crash_before=0.01,seed=7" expertd serve ...

Each kind has the probability with which it strikes, some a number of seconds. docs/testing.md describes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from expertd.kernels.numerics.backend import Backend, LayerWeights, TokenBatch, Underway
from expertd.proto import codec, wire
from expertd.proto.codec import RawRequest, ShardInfo
from expertd.proto.lane.layout import SharedSegment
from expertd.server.options.config import InvalidOption
from expertd.server.rpc.handlers import ExpertShardHandlers
from expertd.server.rpc.tickets import Tickets
from expertd.server.scheduling.batching import Scheduler
from expertd.server.scheduling.shadow import ShadowCheck
from expertd.server.scheduling.shard import Shard
from expertd.server.scheduling.verifier import Verifier
from expertd.server.telemetry.journal import Journal

log = logging.getLogger(__name__)
VARIABLE = "EXPERTD_FAILPOINTS"
FOREVER = 1e9
SECONDS = {
    "delay": 0.05,
    "drop": FOREVER,
    "reset": 0.0,
    "corrupt_reply": 0.0,
    "wrong_receipt": 0.0,
    "crash_before": 0.0,
    "crash_after": 0.0,
    "device_error": 0.0,
    "stuck_device": FOREVER,
    "slow_loading": 1.0,
    "stale_epoch": 0.0,
}
"""The kinds, and how long those last that take time, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Failpoint:
    """One kind of fault in one process, with a sequence of chances of its own."""

    probability: float
    seconds: float
    chance: random.Random

    def strikes(self) -> bool:
        return self.chance.random() < self.probability


class Failpoints:
    """The faults that a process was started with."""

    def __init__(self, points: Mapping[str, Failpoint]) -> None:
        self._points = points

    def __str__(self) -> str:
        return ", ".join(f"{kind}={point.probability:g}:{point.seconds:g}" for kind, point in self._points.items())

    def strikes(self, kind: str) -> bool:
        struck = kind in self._points and self._points[kind].strikes()
        if struck:
            log.warning("failpoint %s strikes", kind)
        return struck

    def seconds(self, kind: str) -> float:
        return self._points[kind].seconds


def failpoints_from_environment() -> Failpoints | None:
    """None, unless the variable is set. Raises `InvalidOption`."""
    text = os.environ.get(VARIABLE, "")
    return parse_failpoints(text) if text else None


def parse_failpoints(text: str) -> Failpoints:
    """Read `kind=probability[:seconds],...[,seed=N]`. Raises `InvalidOption`."""
    settings = dict(item.partition("=")[::2] for item in text.split(","))
    seed = settings.pop("seed", "0")
    points = {}
    for kind, value in settings.items():
        if kind not in SECONDS:
            raise InvalidOption(f"{VARIABLE} names {kind!r}; choose from {', '.join(SECONDS)}")
        probability, _, seconds = value.partition(":")
        try:
            # A generator for each kind: one kind's chances do not depend on which others there are.
            point = Failpoint(float(probability), float(seconds or SECONDS[kind]), random.Random(f"{seed}/{kind}"))
        except ValueError:
            raise InvalidOption(f"{VARIABLE} has {kind}={value}; it must be probability[:seconds]") from None
        if not 0.0 <= point.probability <= 1.0:
            raise InvalidOption(f"{VARIABLE} has {kind}={value}; a probability is from 0 to 1")
        points[kind] = point
    return Failpoints(points)


class FaultyBackend:
    """A backend on which device faults strike, once it has been loaded and checked."""

    def __init__(self, backend: Backend, failpoints: Failpoints) -> None:
        self._backend = backend
        self._failpoints = failpoints
        self._armed = False
        self._broken = False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._backend, name)

    def load_layer(self, layer: int, weights: LayerWeights) -> None:
        if self._failpoints.strikes("slow_loading"):
            time.sleep(self._failpoints.seconds("slow_loading"))
        self._backend.load_layer(layer, weights)

    def warm_up(self) -> None:
        self._backend.warm_up()
        self._armed = True

    def submit(self, layer: int, requests: Sequence[TokenBatch], reply_dtype: torch.dtype) -> Underway:
        if not self._armed:
            return self._backend.submit(layer, requests, reply_dtype)
        if self._failpoints.strikes("crash_before"):
            _crash()
        if self._failpoints.strikes("stuck_device"):
            time.sleep(self._failpoints.seconds("stuck_device"))
        # Like an illegal address on a GPU: whatever comes after it fails too.
        self._broken = self._broken or self._failpoints.strikes("device_error")
        self._check()
        underway = self._backend.submit(layer, requests, reply_dtype)
        if self._failpoints.strikes("crash_after"):
            underway.result()
            _crash()
        return underway

    def synchronize(self) -> None:
        self._check()
        self._backend.synchronize()

    def _check(self) -> None:
        if self._broken:
            raise RuntimeError("failpoint device_error")


class FaultyHandlers(ExpertShardHandlers):
    """RPCs on whose answers faults strike."""

    def __init__(
        self,
        shard: Shard,
        info: ShardInfo,
        scheduler: Scheduler,
        verifier: Verifier,
        shadow: ShadowCheck | None,
        journal: Journal,
        tickets: Tickets,
        failpoints: Failpoints,
    ) -> None:
        super().__init__(shard, info, scheduler, verifier, shadow, journal, tickets)
        self._failpoints = failpoints

    async def _answer(
        self, request: RawRequest, caller: str, time_remaining: float | None, segment: SharedSegment | None = None
    ) -> bytes:
        strikes = self._failpoints.strikes
        if strikes("stale_epoch"):
            self._begin_placement(self._shard.placement_epoch + 1)
        if strikes("drop"):
            await asyncio.sleep(self._failpoints.seconds("drop"))
        if strikes("delay"):
            await asyncio.sleep(self._failpoints.seconds("delay"))
        if strikes("reset"):
            _reset_connection(caller)
        answer = await super()._answer(request, caller, time_remaining, segment)
        if segment is None and strikes("corrupt_reply"):
            answer = _with_a_flipped_bit(answer)
        if strikes("wrong_receipt"):
            # A repeated field goes on where it occurs again: one more pair of this server's first expert.
            answer += wire.packed_field(5, self._shard.experts[:1]) + wire.packed_field(6, (request.num_tokens + 1,))
        return answer

    def _begin_placement(self, epoch: int) -> None:
        self._shard = replace(self._shard, placement_epoch=epoch)
        self.info = replace(self.info, placement_epoch=epoch)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _with_a_flipped_bit(answer: bytes) -> bytes:
    altered = bytearray(answer)
    partials = codec.parse_response(altered).partials
    partials[len(partials) // 2] ^= 0x10
    return bytes(altered)


def _reset_connection(peer: str) -> None:
    """End the connection to `peer`, such as ipv4:127.0.0.1:4711, without a word of gRPC."""
    port = int(peer.rpartition(":")[2])
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as connection:
            if connection.family != socket.AF_UNIX and connection.getpeername()[1] == port:
                connection.shutdown(socket.SHUT_RDWR)
