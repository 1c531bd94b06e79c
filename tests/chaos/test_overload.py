"""Three times as much as a server can do: it keeps doing what it can, and refuses the rest at once."""

import urllib.request
from pathlib import Path

import pytest

from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.client.transport.grpc_streams import GrpcTransport
from tests.chaos.fleet import Fleet, ServerProcess
from tests.chaos.load import make_cases
from tests.chaos.offers import Offers
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
        requests = Offers([transport], await transport.get_shard(10.0), [case])
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
