"""Load that checks every answer: callers that repeat calls whose results are known, until they are told to stop.

    python -m tests.chaos.load --servers 10.0.0.1:50051 10.0.0.2:50051 --model /models/small --seconds 60

prints one line at the end, which SIGINT and SIGTERM hasten, and exits with 1 after a violation.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from expertd.client.base.quantiles import p50_p99
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.fleet.discovery import Discovery
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.numerics.quantize import quantize_activations
from expertd.kernels.oracle.reference import reference_partials, relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import load_layer
from expertd.proto.base.errors import ExpertdError
from tests.support.fence.wrong import wrong

TOLERANCE = 1e-5
"""Of results whose activations and replies are not rounded; anything lost or doubled differs by far more."""
SLACK = 10.0
"""Seconds beyond `call_timeout` after which a call counts as hanging: machines under test are busy."""
CASES = 12
SIZES = (1, 3, 8, 20, 48)
CONFIG = CoordinatorConfig(
    hidden_dtype=torch.bfloat16,
    reply_dtype=torch.float32,
    output_dtype=torch.float32,
    connect_timeout=10.0,
    call_timeout=15.0,
    attempt_timeout=3.0,
    owner_timeout=5.0,
    max_attempts=6,
    # Some of the faults strike messages on the network.
    shared_memory_bytes=0,
)


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A call with its result."""

    layer: int
    hidden: Tensor
    ids: Tensor
    weights: Tensor
    right: Tensor


def make_cases(
    model: Path, seed: int, sizes: Sequence[int] = SIZES, *, quantized: bool = False, zipf: float = 0.0
) -> list[Case]:
    """Calls of several sizes for every layer, with what the FP32 reference makes of them, or of their FP8 values.

    Experts are chosen with chances that fall as 1 / rank^zipf; `seed` says which has which rank in a layer.
    """
    generator = torch.Generator().manual_seed(seed)
    cases = []
    with Checkpoint(model) as checkpoint:
        config = checkpoint.config
        experts, top_k = config.n_routed_experts, config.num_experts_per_tok
        for layer in config.moe_layers:
            weights = load_layer(checkpoint, layer, range(experts), lambda _: None)
            chances = (torch.randperm(experts, generator=generator) + 1.0) ** -zipf
            for number in range(CASES):
                count = sizes[number % len(sizes)]
                hidden = torch.randn(count, config.hidden_size, generator=generator).bfloat16()
                ids = torch.multinomial(chances.expand(count, -1), top_k, generator=generator)
                shares = torch.rand(count, top_k, generator=generator)
                sent, scales = hidden, None
                if quantized:
                    sent, scales = quantize_activations(hidden)
                right = reference_partials(TokenBatch(sent, scales, ids.int(), shares), weights)
                cases.append(Case(layer, hidden, ids, shares, right))
    return cases


@dataclass(slots=True)
class Report:
    """What came of the calls."""

    calls: int = 0
    right: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Calls that ended in an error of the project, by its kind: allowed, where a test does not say otherwise."""
    messages: list[str] = field(default_factory=list)
    """Of those errors."""
    violations: list[str] = field(default_factory=list)
    """Wrong, hanging and unexplained calls: never allowed."""
    retries: int = 0
    failovers: int = 0
    hedges: int = 0
    seconds: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def failed(self) -> int:
        return self.errors.total()

    @property
    def elapsed(self) -> float:
        return (self.ended or time.monotonic()) - self.started

    def line(self, name: str) -> str:
        p50, p99 = p50_p99(self.seconds or [0.0])
        kinds = "".join(f", {count} {kind}" for kind, count in sorted(self.errors.items()))
        return (
            f"{name}: {self.calls} calls, {self.calls / self.elapsed:.0f}/s, {len(self.violations)} violations,"
            f" {self.failed} errors{kinds}; p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms,"
            f" max {max(self.seconds, default=0.0) * 1e3:.0f} ms; {self.retries} retries, {self.failovers} failovers,"
            f" {self.hedges} hedges, {self.elapsed:.0f} s"
        )


class CheckedLoad:
    """Callers on one coordinator.

    async with CheckedLoad(addresses, model) as load:
        await load.answered(100)
    print(load.report.line("name"))
    """

    def __init__(
        self,
        servers: Sequence[str] | Discovery,
        model: Path,
        *,
        callers: int = 4,
        seed: int = 0,
        config: CoordinatorConfig = CONFIG,
    ) -> None:
        self.coordinator = Coordinator(servers, config)
        self.report = Report()
        self.last_seen: dict[str, float] = {}
        """Monotonic time of the newest answer of each server."""
        self._config = config
        self.cases = make_cases(model, seed)
        self._callers = callers
        self._stopping = False
        self._running: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self.coordinator.__aenter__()
        self.report.started = time.monotonic()
        self._running = [asyncio.create_task(self._caller(number)) for number in range(self._callers)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        await asyncio.gather(*self._running)
        self.report.ended = time.monotonic()
        await self.coordinator.close()

    async def answered(self, calls: int, timeout: float = 60.0) -> None:
        """Wait until `calls` more calls have ended, in an answer or an error. Raises `TimeoutError`."""
        wanted = self.report.calls + calls
        async with asyncio.timeout(timeout):
            while self.report.calls < wanted:
                await asyncio.sleep(0.005)

    async def uses(self, address: str, since: float, timeout: float = 30.0) -> None:
        """Wait until `address` has answered after the monotonic time `since`. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout):
            while self.last_seen.get(address, 0.0) <= since:
                await asyncio.sleep(0.005)

    async def _caller(self, number: int) -> None:
        while not self._stopping:
            number += 1
            await self._call(self.cases[number % len(self.cases)])

    async def _call(self, case: Case) -> None:
        report, started = self.report, time.monotonic()
        try:
            async with asyncio.timeout(self._config.call_timeout + SLACK):
                result = await self.coordinator.execute(
                    case.layer, case.hidden, topk_ids=case.ids, topk_weights=case.weights
                )
        except ExpertdError as error:
            report.errors[type(error).__name__] += 1
            report.messages.append(f"{time.monotonic() - started:.2f} s: {error}")
            # A call that fails at once is no load.
            await asyncio.sleep(0.01)
        except TimeoutError:
            report.violations.append(f"a call hung for {time.monotonic() - started:.1f} s")
        except Exception as error:
            report.violations.append(f"unexplained: {type(error).__name__}: {error}")
        else:
            off = relative_error(result.output, case.right)
            if not is_right(off) or result.degraded_tokens:
                report.violations.append(wrong(f"layer {case.layer}, {len(case.ids)} tokens: error {off:.2e}"))
            report.right += 1
            report.retries += result.effort.retries
            report.failovers += result.effort.failovers
            report.hedges += result.effort.hedges
            for server in result.servers:
                self.last_seen[server.address] = time.monotonic()
        report.calls += 1
        report.seconds.append(time.monotonic() - started)


def is_right(error: float) -> bool:
    """Whether a result with this relative error is; NaN never is."""
    return error <= TOLERANCE


async def _main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    load = CheckedLoad(arguments.servers, arguments.model, callers=arguments.callers, seed=arguments.seed)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with load:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), arguments.seconds)
    print(load.report.line(arguments.name))
    for message in load.report.messages[:5]:
        print(f"error after {message}", file=sys.stderr)
    for violation in load.report.violations[:20]:
        print(f"violation: {violation}", file=sys.stderr)
    return 1 if load.report.violations or load.report.calls < arguments.least else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", nargs="+", required=True, metavar="HOST:PORT")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint that the servers hold")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=int, default=100, help="calls without which the run has not run")
    parser.add_argument("--name", default="load")
    sys.exit(asyncio.run(_main(parser.parse_args())))
