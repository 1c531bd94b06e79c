"""Heat for `expertd plan`: from files, from running servers, from both."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from expertd.cli import main
from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.heat import read_heat
from expertd.server.app import Server
from tests.support.fleets import running_servers
from tests.support.serving import execute_method, open_channel, random_batch, request_for

HALVES = (range(8), range(8, 16))


def url(server: Server) -> str:
    return f"http://{server.metrics_address}/metrics"


async def test_loads_come_from_running_servers(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = np.zeros((2, 16))
    async with running_servers(small_model, HALVES, per_expert_metrics=True) as servers:
        for index, server in enumerate(servers):
            batch = random_batch(30, 256, 8, 4, seed=index)
            batch.expert_ids[batch.expert_ids >= 0] += 8 * index
            async with open_channel(server) as channel:
                await execute_method(channel)(request_for(server, batch, layer=2))
            expected[1] += np.bincount(batch.expert_ids[batch.expert_ids >= 0].numpy(), minlength=16)
        urls = [url(server) for server in servers]
        layers, loads = await asyncio.to_thread(read_heat, urls)
        assert layers == (1, 2)
        assert np.array_equal(loads, expected)
        planned = await asyncio.to_thread(main, ["plan", "--loads", *urls, "--servers", "2", "--slots", "10"])
        assert planned == 0
        printed = capsys.readouterr().out
        assert "placement of 16 experts, layers 1-2" in printed
        assert "no traffic in layers 1;" in printed
        with pytest.raises(InvalidPlan, match="layer 1, expert 0; name a server that owns it"):
            await asyncio.to_thread(read_heat, urls[1:])
        with pytest.raises(InvalidPlan, match="layer 1, expert 8; name a server that owns it"):
            await asyncio.to_thread(read_heat, urls[:1])


async def test_a_server_that_does_not_count_experts_is_named_with_the_cure(small_model: Path) -> None:
    async with running_servers(small_model, [range(16)]) as servers:
        with pytest.raises(InvalidPlan, match=r"/metrics has no .* start the server with --per-expert-metrics"):
            await asyncio.to_thread(read_heat, [url(servers[0])])


def test_sources_are_added(tmp_path: Path) -> None:
    first, second, text = tmp_path / "first.json", tmp_path / "second.json", tmp_path / "metrics.txt"
    first.write_text(json.dumps({"3": [1, 2], "10": [3, 0]}))
    second.write_text(json.dumps({"3": [10, 0.5]}))
    text.write_text(
        'expertd_expert_pairs_total{layer="3",expert="1",instance="a"} 5\n'
        'expertd_expert_pairs_total{layer="3",expert="1",instance="b"} 1e+02\n'
    )
    layers, loads = read_heat([str(first), str(second), str(text)])
    assert layers == (3, 10)
    assert loads.tolist() == [[11, 107.5], [3, 0]]


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "{}", '{"a": [1]}', '{"3": []}', '{"3": [1], "03": [2]}', 'expertd_expert_pairs_total{layer="x"} 1\n'],
)
def test_unusable_sources_are_named(tmp_path: Path, text: str) -> None:
    source = tmp_path / "loads"
    source.write_text(text)
    with pytest.raises(InvalidPlan, match=str(source)):
        read_heat([str(source)])


def test_sources_that_cannot_be_read_are_errors_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in (str(tmp_path / "none"), "http://127.0.0.1:1/metrics"):
        assert main(["plan", "--loads", source, "--servers", "2"]) == 2
        assert "expertd plan: error: " in capsys.readouterr().err
