"""Three times as much as a server can do: it keeps doing what it can, and refuses the rest at once."""

import asyncio
import itertools
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch

from expertd.client.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.client.transport import GrpcTransport
from expertd.kernels.reference import relative_error
from expertd.proto.codec import ExecuteCall, ShardInfo
from expertd.proto.errors import ExpertdError
from tests.chaos.fleet import Fleet, ServerProcess
from tests.chaos.load import TOLERANCE, Case, make_cases
from tests.chaos.scale import FULL, scaled

SECONDS = scaled(300.0, 8.0)
PEAK_SECONDS = scaled(15.0, 4.0)
SLICES = scaled(5, 1)
FACTOR = 3.0
LEAST_GOODPUT = 0.9 if FULL else 0.6
"""Of the peak; a few seconds on a machine with other work say less."""
REFUSED_WITHIN = 5e-3
GROWTH_BYTES = 100 << 20
QUEUE = ("--max-tokens-per-request", "64", "--max-batch-tokens", "256", "--max-queued-tokens", "512")
HEAVY = DemoModel(
    hidden_size=512,
    moe_intermediate_size=2048,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    moe_layers=1,
)
"""Experts with so much to compute that the load costs little beside them."""


class Requests:
    """Requests to one server over one transport, and what became of them."""

    def __init__(self, transport: GrpcTransport, shard: ShardInfo, case: Case) -> None:
        self._transport = transport
        self._shard = shard
        self._case = case
        self._ids = itertools.count(1)
        self.outcomes: Counter[str] = Counter()
        self.wrong = 0

    async def send(self) -> None:
        case = self._case
        call = ExecuteCall(
            request_id=next(self._ids),
            model_fingerprint=self._shard.model_fingerprint,
            placement_epoch=self._shard.placement_epoch,
            layer=case.layer,
            hidden=case.hidden,
            scales=None,
            expert_ids=case.ids.int(),
            weights=case.weights,
            reply_dtype=torch.float32,
            timeout=30.0,
        )
        try:
            result = await self._transport.execute(call)
        except ExpertdError as error:
            self.outcomes[type(error).__name__] += 1
        else:
            self.outcomes["ok"] += 1
            self.wrong += relative_error(result.partials, case.right) > TOLERANCE

    async def peak(self, seconds: float) -> float:
        """Answers a second, with always as much waiting as the queue takes."""
        before, started = self.outcomes["ok"], time.monotonic()

        async def caller() -> None:
            while time.monotonic() - started < seconds:
                await self.send()

        await asyncio.gather(*(caller() for _ in range(6)))
        return (self.outcomes["ok"] - before) / (time.monotonic() - started)

    async def flood(self, rate: float, seconds: float) -> float:
        """Send `rate` requests a second whatever becomes of them; the answers a second."""
        before, started = self.outcomes["ok"], time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
                group.create_task(self.send())
            answered = self.outcomes["ok"] - before
            elapsed = time.monotonic() - started
        return answered / elapsed


def refusals(metrics_url: str) -> tuple[float, float]:
    """How many there were, and how many of them took no longer than `REFUSED_WITHIN`."""
    with urllib.request.urlopen(metrics_url) as answer:
        samples = dict(line.rsplit(" ", 1) for line in str(answer.read(), "utf-8").splitlines() if line[0] != "#")
    name = "expertd_refusal_duration_seconds"
    return float(samples[f"{name}_count"]), float(samples[f'{name}_bucket{{le="0.005"}}'])


@pytest.fixture(scope="module")
def heavy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("heavy"), HEAVY)


async def test_goodput_stays_refusals_are_immediate_and_memory_is_bounded(heavy_model: Path, tmp_path: Path) -> None:
    case = next(case for case in make_cases(heavy_model, seed=0) if len(case.ids) == 48)
    async with Fleet(heavy_model, tmp_path) as fleet:
        server: ServerProcess = await fleet.start("0-15", options=QUEUE)
        transport = GrpcTransport(server.address)
        requests = Requests(transport, await transport.get_shard(10.0), case)
        await requests.peak(1.0)
        peaks, goodputs, sizes = [], [], [server.rss()]
        for _ in range(SLICES):
            peaks.append(await requests.peak(PEAK_SECONDS))
            goodputs.append(await requests.flood(FACTOR * peaks[-1], SECONDS / SLICES))
            sizes.append(server.rss())
        count, quick = refusals(server.metrics_url)
        await transport.close()
    shares = sorted(goodput / peak for goodput, peak in zip(goodputs, peaks, strict=True))
    share = shares[len(shares) // 2]
    print(
        f"\n{FACTOR:g}x overload, {SECONDS:g} s: {requests.outcomes.total()} calls, peak {max(peaks):.1f}/s, goodput"
        f" {share:.0%} of it, {count:.0f} refused, {quick / max(count, 1):.2%} of them within 5 ms,"
        f" {requests.wrong} violations, RSS {sizes[0] >> 20} -> {max(sizes) >> 20} MB, {dict(requests.outcomes)}"
    )
    assert requests.wrong == 0
    assert set(requests.outcomes) == {"ok", "Overloaded"}
    assert share >= LEAST_GOODPUT
    assert count > requests.outcomes["ok"] / 3, "that was no overload"
    assert quick >= 0.99 * count
    assert max(sizes) - sizes[1] < GROWTH_BYTES
