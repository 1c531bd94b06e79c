"""One server as a coordinator knows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from expertd.client.fleet.latency import Latency
from expertd.client.fleet.load import Load
from expertd.client.transport.interface import Transport
from expertd.proto.base.errors import (
    Cancelled,
    DeadlineExceeded,
    ExpertdError,
    ModelMismatch,
    ServerFault,
    StalePlacement,
    Unavailable,
    UnknownExpert,
)
from expertd.proto.codec import ShardInfo

LOST = (Unavailable, DeadlineExceeded, Cancelled, ServerFault, StalePlacement, UnknownExpert, ModelMismatch)
"""Errors after which a server is not used until it has answered a probe."""


@dataclass(slots=True, eq=False)
class Member:
    """One server."""

    number: int
    """Never given to another one."""
    transport: Transport
    shard: ShardInfo | None = None
    """What it owned when it was asked last."""
    other: ShardInfo | None = None
    """What it owned then, of another model than the one that is called."""
    in_use: bool = False
    why_not: ExpertdError | None = None
    """Why it went out of use."""
    outstanding_tokens: int = 0
    latency: Latency = field(default_factory=Latency)
    load: Load = field(default_factory=Load)
    weight: float = 1.0
    """How much more than others what it has to do counts, as it takes longer for it."""
    slow: bool = False
    """It takes far longer than others: it is asked only in need."""
    busy_until: float = 0.0
    """On the monotonic clock: when a server that was full wants to be asked again."""
    failures: int = 0
    """Losses in a row, without an answered call in between."""
    under_way: set[Callable[[], object]] = field(default_factory=set)
    """Each gives up an attempt that waits for this server."""
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    follower: asyncio.Task[None] | None = None

    def answered(self, layer: int, tokens: int, pairs: int, seconds: float) -> None:
        """It has computed something within `seconds`. Any thread."""
        self.failures = 0
        self.latency.answered(tokens, seconds)
        self.load.add(layer, pairs)

    def reached(self, device: torch.device) -> str:
        """How calls with tensors on `device` reach it now, for metrics."""
        if device not in self.transport.shared_devices:
            return "grpc"
        return "gpu_memory" if device.type == "cuda" else "shared_memory"

    @property
    def standing(self) -> str:
        """As metrics name it."""
        if self.in_use:
            return "in_use"
        if not isinstance(self.why_not, ModelMismatch):
            return "unavailable"
        return "other_weights" if self.other is None else "another_model"
