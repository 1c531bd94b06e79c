"""`expertd bench serve --transport stream`: what it says without a GPU, and measures with one that stands in."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.cli import main
from expertd.client.coordinator import Coordinator
from expertd.client.tools.bench import stream
from expertd.client.tools.bench.calls import _beside_floor
from expertd.client.tools.bench.floors import Exchange
from expertd.client.tools.bench.servers import Way
from expertd.proto.base.errors import ExpertdError
from tests.support.coordinators import EXACT, HIDDEN, tokens
from tests.support.fence.markers import no_gpu
from tests.support.fleets import HALVES, addresses, running_servers
from tests.support.serving import running_server


class HostEvent:
    """In place of CUDA's, where what is enqueued is done at once."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, after: Any) -> float:  # noqa: ANN401
        return 1e3 * (float(after.at) - self.at)


async def test_calls_are_timed_one_by_one_and_from_a_graph(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(stream, "captured", lambda call: call)
    monkeypatch.setattr(Way, "device", torch.device("cpu"))
    async with running_servers(small_model, HALVES) as servers, Coordinator(addresses(servers), EXACT) as moe:
        await moe.prepare_stream(8, "cpu", timeout=20.0)
        enqueued: list[int] = []
        on_stream = moe.on_stream

        def noted(layer: int, hidden: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
            enqueued.append(len(hidden))
            return on_stream(layer, hidden, *more)

        monkeypatch.setattr(moe, "on_stream", noted)
        way = Way("stream", addresses(servers), moe, 8)
        rows = [row async for row in stream.measure_stream(way, tokens(3).float(), Exchange(100, 200), 0.0)]
    assert [(row.what, row.tokens, row.callers) for row in rows] == [
        ("expertd stream", 3, 1),
        ("expertd stream graph", 3, 1),
    ]
    # Of each way one before the clock runs.
    assert enqueued == [3] * (2 + sum(row.calls for row in rows))
    for row in rows:
        compute = row.stages["compute"]
        assert 0 < compute < row.p50 <= row.p99
        assert _beside_floor(row, 0.0).over_floor == pytest.approx(row.p50 / compute)


async def test_a_call_that_failed_is_not_measured(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(stream, "captured", lambda call: call)
    monkeypatch.setattr(Way, "device", torch.device("cpu"))
    rows = []

    async def measure() -> None:
        async with running_server(small_model, range(16)) as server, Coordinator([str(server.address)], EXACT) as moe:
            await moe.prepare_stream(8, "cpu", timeout=5.0)
            way = Way("stream", [str(server.address)], moe, 8)
            async for row in stream.measure_stream(way, torch.zeros(1, HIDDEN), Exchange(1, 1), 0.0):
                rows.append(row.what)
                server.stop()

    with pytest.raises(ExpertdError) as failed:
        await measure()
    assert rows == ["expertd stream"], failed.value


@no_gpu
def test_without_a_gpu_it_says_so(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", str(small_model), "--backend", "torch", "--tokens", "1", "--transport", "stream")
    assert main(["bench", "serve", *arguments]) == 2
    assert "error: --transport stream: torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--no-experts", "--layers", "--micro-batches"])
def test_it_is_for_calls_of_many_sizes(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--transport", "stream", option]) == 2
    assert f"--transport stream measures calls of many sizes and does not go with {option}" in capsys.readouterr().err
