"""What the status page and `expertd top` show of a server."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from expertd.kernels.model.ranges import describe_experts, format_ranges
from expertd.proto.codec import ShardInfo
from expertd.server.options.config import ServerConfig
from expertd.server.telemetry.journal import REMEMBERED_ANSWERS, Answered, Journal
from expertd.server.telemetry.metrics import STAGES

RATE_SECONDS = 60.0
"""Span of the rates and quantiles, or that of the answers which the journal remembers when it is shorter."""


@dataclasses.dataclass(frozen=True)
class Status:
    """One server, to be looked at from any thread."""

    config: ServerConfig
    info: Callable[[], ShardInfo]
    address: Callable[[], str]
    journal: Journal
    queued_tokens: Callable[[], int]
    closed_because: Callable[[], str | None]
    devices: Callable[[], list[dict[str, Any]]] = list
    """What computes, and how it is."""
    clock: Callable[[], float] = time.monotonic
    """Of ages: that of the day may be set back."""
    started: float = dataclasses.field(default_factory=time.monotonic)

    def snapshot(self) -> dict[str, Any]:
        """All of it as JSON values; times in seconds."""
        now = self.clock()
        answers, errors, loads = self.journal.answers, self.journal.errors, self.journal.loads
        info = self.info()
        return {
            "address": self.address(),
            "version": info.version,
            "backend": info.backend,
            "backend_reason": info.backend_reason,
            "device": info.device,
            "devices": self.devices(),
            "model": str(self.config.model),
            "model_fingerprint": info.model_fingerprint,
            "routed_experts": info.routed_experts,
            "ready": self.closed_because() is None,
            "reason": self.closed_because(),
            "time": time.time(),
            "uptime": now - self.started,
            "queue": {"tokens": self.queued_tokens(), "capacity": self.config.max_queued_tokens},
            "in_flight": self.journal.in_flight,
            **_lately([answer for answer in answers if answer.time > now - RATE_SECONDS], self._span(answers, now)),
            "outcomes": self.journal.outcomes,
            "errors": [dataclasses.asdict(error) for error in reversed(errors)],
            "loads": loads.tables(),
            "config": {
                option.name: _as_text(getattr(self.config, option.name)) for option in dataclasses.fields(self.config)
            },
        }

    def _span(self, answers: Sequence[Answered], now: float) -> float:
        """Seconds that the remembered answers cover, at most `RATE_SECONDS`."""
        full = len(answers) == REMEMBERED_ANSWERS
        return min(RATE_SECONDS, now - (answers[0].time if full else self.started))


def build_of(info: ShardInfo) -> dict[str, str]:
    """What runs, as the labels of `expertd_build_info`."""
    return {
        "version": info.version,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backend": info.backend,
        "device": info.device,
    }


def placement_of(info: ShardInfo) -> dict[str, str]:
    """What is owned, as the labels of `expertd_placement_info`."""
    return {
        "model_fingerprint": info.model_fingerprint,
        "layers": format_ranges(info.layers),
        "experts": describe_experts(info.experts),
        "routed_experts": str(info.routed_experts),
    }


def _lately(answers: Sequence[Answered], span: float) -> dict[str, Any]:
    seconds = np.array([answer.seconds for answer in answers]).reshape(-1, len(STAGES))
    p50, p99 = np.quantile(seconds, (0.5, 0.99), axis=0) if len(answers) else (np.zeros(len(STAGES)),) * 2
    return {
        "span": span,
        "requests_per_second": len(answers) / span,
        "tokens_per_second": sum(answer.tokens for answer in answers) / span,
        "stages": {stage: {"p50": p50[i], "p99": p99[i]} for i, stage in enumerate(STAGES)} if answers else {},
    }


def _as_text(value: object) -> str:
    """As on the command line; all tuples are experts or layers."""
    return format_ranges(value) if isinstance(value, tuple) else "" if value is None else str(value)
