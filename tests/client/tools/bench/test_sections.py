"""`expertd bench serve` of all layers, of a fan-out and of micro-batches, against servers of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from expertd.cli import main
from expertd.client.tools.bench.fan_out import choice_on, spans_of
from expertd.client.tools.bench.report import Comparison, Section, print_section
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.weights.checkpoint import Checkpoint
from tests.support.fence.markers import no_gpu

PNG = b"\x89PNG\r\n\x1a\n"
EXPERTD = (sys.executable, "-P", "-m", "expertd.cli", "bench", "serve", "--backend", "torch")
SMALL = ("--hidden-size", "256", "--intermediate-size", "128")


@pytest.fixture
def small_config(small_model: Path) -> MoeConfig:
    with Checkpoint(small_model) as checkpoint:
        return checkpoint.config


def bench(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The sections of the JSON by name, and the tables."""
    file, picture = folder / "found.json", folder / "found.png"
    ended = subprocess.run(
        [*EXPERTD, *arguments, "--json", str(file), "--plot", str(picture)],
        env=os.environ | {"XDG_CACHE_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert picture.read_bytes().startswith(PNG)
    found = json.loads(file.read_text())
    assert found["rows"] == []
    return {section["name"]: section["rows"] for section in found["sections"]}, ended.stdout


@no_gpu
def test_all_layers_one_after_another_on_every_transport(tmp_path: Path) -> None:
    sections, tables = bench(tmp_path, *SMALL, "--layers", "--seconds", "0.1")
    (rows,) = sections.values()
    ways = [(transport, how) for transport in ("grpc", "unix", "shm") for how in ("awaited", "from a thread")]
    assert [(row["transport"], row["what"]) for row in rows] == [(way, f"all 2 layers, {how}") for way, how in ways]
    for row in rows:
        assert set(row["parts"]) == {"layer 1", "layer 2"}
        assert 0 < max(row["parts"].values()) < row["p50"] <= row["p99"]
        # Of a floor that is not measured at the same time.
        assert row["ratio"] > 0.1
    assert "layers, x: p50 over that of the same bytes without expertd, once a layer, and computing" in tables


@no_gpu
def test_a_fan_out_and_what_else_is_asked_for_over_the_same_servers(tmp_path: Path, small_model: Path) -> None:
    arguments = ("--servers-of-its-own", "4", "--layers", "--micro-batches", "--tokens", "6", "--caller-ms", "0.5")
    sections, tables = bench(tmp_path, "--model", str(small_model), *arguments, "--seconds", "0.05")
    assert list(sections) == ["fan-out", "layers", "micro-batches"]
    fan_out = [(row["transport"], row["what"]) for row in sections["fan-out"]]
    assert fan_out == [
        (transport, f"{servers}, {how}")
        for transport in ("grpc", "shm")
        for how in ("awaited", "from a thread")
        for servers in ("1 server", "4 servers")
    ]
    assert [row["ratio"] for row in sections["fan-out"]][::2] == [1.0] * 4
    overlaps = sections["micro-batches"]
    whats = ["halves one after another", "halves in turns", "halves together", "the whole batch"]
    assert [row["what"] for row in overlaps] == whats * 2
    assert {row["tokens"] for row in overlaps} == {6}
    for row in overlaps:
        first = next(one for one in overlaps if one["transport"] == row["transport"])
        assert row["ratio"] == pytest.approx(row["p50"] / first["p50"])
        assert set(row["parts"]) == {"call of a half", "caller for a half"}
    assert all(f"{what}, x: p50 over that of" in tables for what in sections)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--servers-of-its-own", "1"), "--servers-of-its-own 1: there must be two at least"),
        (("--servers-of-its-own", "2", "--servers", "a:1"), "--servers-of-its-own is for servers of its own, not"),
        (("--servers-of-its-own", "2", "--transport", "unix"), "--transport unix is of one server of its own"),
        (("--servers-of-its-own", "2", "--devices", "0-1"), "--devices is of one server of its own, not"),
        (("--servers", "a:1", "--devices", "0-1"), "--devices is for servers of its own, not for --servers"),
        (("--servers", "a:1", "--model", "/x"), "--model is for servers of its own, not for --servers"),
        (("--servers", "a:1", "--hidden-size", "256"), "--hidden-size is for servers of its own, not for --servers"),
        (("--model", "/x", "--intermediate-size", "128"), "are of a checkpoint that it writes, not for --model"),
        (("--model", "/nowhere"), "/nowhere/config.json does not exist"),
        (("--hidden-size", "100"), "--hidden-size 100: weights are in blocks of 128"),
        (("--layers", "--callers", "2"), "--layers does not go with --callers"),
        (("--micro-batches", "--no-experts"), "--micro-batches does not go with --no-experts"),
        (("--layers", "--tokens", "2"), "--layers measures calls of one token and does not go with --tokens"),
        (("--micro-batches", "--tokens", "2", "7"), "--micro-batches halves batches; --tokens 7 is odd"),
        (("--caller-ms", "1"), "--caller-ms needs --micro-batches"),
        (("--micro-batches", "--caller-ms", "0"), "--caller-ms needs --micro-batches and more than nothing"),
        (("--tokens", "8", "0"), "--tokens 0: there must be one at least"),
        (("--callers", "0"), "--callers 0: there must be one at least"),
        (("--seconds", "0"), "--seconds 0: there must be some"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_go_together_is_said_in_one_line(
    arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("expertd bench serve: error: ")
    assert message in line


@pytest.mark.parametrize(
    ("servers", "message"),
    [("3", "16 experts cannot be split evenly over 3 servers"), ("8", "one has fewer experts than a token's 4")],
)
def test_servers_that_a_model_does_not_allow_are_not_started(
    servers: str, message: str, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--model", str(small_model), "--servers-of-its-own", servers]) == 2
    assert capsys.readouterr().err == f"expertd bench serve: error: --servers-of-its-own {servers}: {message}\n"


@pytest.mark.parametrize(("servers", "spans"), [(2, [1, 2]), (4, [1, 4]), (8, [1, 4])])
def test_a_token_goes_to_one_server_to_four_and_to_all_that_it_can_reach(
    servers: int, spans: list[int], small_config: MoeConfig
) -> None:
    assert spans_of(small_config, servers) == spans
    local = small_config.n_routed_experts // servers
    for span in spans:
        (ids,) = choice_on(small_config, servers, span).tolist()
        assert len(set(ids)) == small_config.num_experts_per_tok
        assert {expert // local for expert in ids} == (set(range(span)) if local * span >= len(ids) else {0, 1})


def test_of_many_parts_the_table_has_the_median_and_the_longest(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {f"layer {layer}": layer / 1e3 for layer in range(1, 6)}
    row = Comparison("shm", "all 5 layers", 1, 10, 0.015, 0.016, 2.5, parts)
    print_section(Section("layers", "something", [row]))
    assert "median of 5 3.000, layer 5 5.000" in capsys.readouterr().out


def test_a_bench_that_is_told_to_stop_stops_its_servers(tmp_path: Path, small_model: Path) -> None:
    arguments = ("--model", str(small_model), "--servers-of-its-own", "2", "--seconds", "0.5")
    with subprocess.Popen([*EXPERTD, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        # The echo and two servers.
        while len(started := children.read_text().split()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "expertd bench serve: interrupted; its own servers are stopped"
    assert len(started) == 3
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
