"""What a call of a layer gives back, and how it comes from the answers of its servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from expertd.client.base.blocks import BLOCK_TOKENS, start_blocks
from expertd.client.call.dispatch import Dispatch, Work, combine, contributions
from expertd.client.telemetry.meter import CallMeter
from expertd.client.telemetry.metrics import Waited
from expertd.proto.codec import ExecuteResult, StageTimings


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one dispatch."""

    dispatch: Dispatch
    result: ExecuteResult
    address: str
    round_trip: float
    """Seconds."""


@dataclass(slots=True)
class Effort:
    """What a call took beside its first attempts."""

    retries: int = 0
    """Attempts after one that failed."""
    failovers: int = 0
    """Of those, on another server."""
    hedges: int = 0
    """Attempts beside one that was late."""


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What one server did for one call."""

    address: str
    tokens: int
    pairs: int
    round_trip: float
    """Seconds from sending to the decoded answer; of a split batch, the longest part's. What came through shared memory
    before anybody waited for it has what `timings` say."""
    timings: StageTimings
    """The server's own account; of a split batch, the slowest part's."""


@dataclass(frozen=True, slots=True)
class MoeResult:
    """The output of one layer with how it came about."""

    output: Tensor
    """[..., H] of the coordinator's output dtype: sum over each token's experts of weight * expert(hidden)."""
    servers: tuple[ServerReport, ...]
    effort: Effort
    degraded_tokens: int = 0
    """Tokens that lack experts because nobody computed them; 0 unless `on_missing` is "renormalize"."""
    missing_experts: tuple[int, ...] = ()
    """Global ids of the experts that they lack."""
    model_fingerprint: str = ""
    """Of the weights that all of it was computed with."""

    def __repr__(self) -> str:
        servers = ", ".join(f"{server.address} {server.round_trip * 1e3:.1f} ms" for server in self.servers)
        degraded = f"; {self.degraded_tokens} tokens lack experts" if self.degraded_tokens else ""
        return f"MoeResult(output {list(self.output.shape)} {self.output.dtype}; {servers}{degraded})"


def ended(meter: CallMeter, result: MoeResult) -> Callable[[], None]:
    """End the call that `meter` has measured; what this returns counts it, and does not keep its output."""
    return meter.answered(result.output, result.degraded_tokens, partial(_waited_for, result.servers))


def _waited_for(servers: Sequence[ServerReport]) -> Waited:
    """The slowest of a call's."""
    if not servers:
        return Waited(0.0, 0.0, 0.0)
    slowest = max(servers, key=lambda server: server.round_trip)
    spent = slowest.timings
    return Waited(slowest.round_trip, spent.queue, spent.copy_in + spent.compute + spent.copy_out)


def experts_of(parts: Sequence[Work]) -> tuple[int, ...]:
    """Global ids, ascending."""
    return tuple(sorted({expert for part in parts for expert in part.expected_receipt()}))


async def combine_all(sums: Tensor, answers: Sequence[Answer]) -> None:
    """Write what `answers` give to each token to `sums` [T, H]."""
    parts, num_tokens = [(answer.dispatch, answer.result) for answer in answers], len(sums)
    if sums.is_cuda:
        combine(sums, contributions(parts, num_tokens, num_tokens)[0])
        return
    blocks = contributions(parts, num_tokens, BLOCK_TOKENS)
    await asyncio.gather(
        *start_blocks(num_tokens, lambda rows: combine(sums[rows], blocks[rows.start // BLOCK_TOKENS]))
    )


def report(answers: Iterable[Answer]) -> tuple[ServerReport, ...]:
    """The answers by server, in the order in which the servers first occur."""
    return by_server(
        ServerReport(
            address=answer.address,
            tokens=len(answer.dispatch.tokens),
            pairs=sum(answer.result.receipt.values()),
            round_trip=answer.round_trip,
            timings=answer.result.timings,
        )
        for answer in answers
    )


def by_server(parts: Iterable[ServerReport]) -> tuple[ServerReport, ...]:
    """Reports of parts of a call, those of each server in one."""
    reports: dict[str, ServerReport] = {}
    for part in parts:
        known = reports.setdefault(part.address, part)
        if known is not part:
            reports[part.address] = ServerReport(
                part.address,
                known.tokens + part.tokens,
                known.pairs + part.pairs,
                max(known.round_trip, part.round_trip),
                max(known.timings, part.timings, key=lambda timings: timings.total),
            )
    return tuple(reports.values())
