"""`expertd bench serve --no-experts`: what moving the bytes costs, for every transport beside the floors."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from expertd.cli import main
from expertd.client.tools.bench.floors import Exchange, raw_socket_seconds, running_echo
from expertd.client.tools.bench.transports import calls_for_nothing

SMALL = ("--hidden-size", "256", "--intermediate-size", "128", "--backend", "torch", "--seconds", "0.05")


def test_every_transport_and_the_lane_alone_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "rows.json"
    command = [sys.executable, "-P", "-m", "expertd.cli", "bench", "serve", "--no-experts", *SMALL]
    # Of 20 tokens over gRPC two parts, which do not fit one message.
    arguments = ["--tokens", "1", "20", "--chunk-bytes", str(10 * 512), "--json", str(file)]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(file.read_text())["rows"]
    floors = {"grpc echo", "raw socket", "memcpy"}
    expertd = {f"expertd {name}" for name in ("grpc", "unix", "shm", "shm thread", "lane")}
    assert {(row["what"], row["tokens"]) for row in rows} == {(what, t) for what in floors | expertd for t in (1, 20)}
    assert all(row["callers"] == 1 and 0 < row["p50"] <= row["p99"] for row in rows)
    computed = [row["stages"]["compute"] for row in rows if row["stages"]]
    assert len(computed) == 8
    assert not any(computed)
    p50 = {(row["what"], row["tokens"]): row["p50"] for row in rows}
    for row in rows:
        below = {"expertd grpc": "grpc echo", "expertd unix": "grpc echo"}.get(row["what"], "raw socket")
        ratio = row["p50"] / p50[below, row["tokens"]] if row["what"] in expertd else None
        assert row["over_floor"] == (ratio if ratio is None else pytest.approx(ratio))
        assert row["call_p50"] is None


@pytest.mark.parametrize("more", [("--callers", "2"), ("--servers", "a:1", "b:1")])
def test_it_is_for_one_caller_and_one_server(more: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--no-experts", *more]) == 2
    assert "--no-experts is for one caller, without --callers, and one server" in capsys.readouterr().err


def test_calls_for_nothing_have_all_tokens_and_no_expert() -> None:
    shard = SimpleNamespace(model_fingerprint="model", placement_epoch=1, layers=[3])
    calls = calls_for_nothing(shard, torch.randn(10, 256), 4)  # type: ignore[arg-type]
    assert [len(call.hidden) for call in calls] == [4, 4, 2]
    assert len({call.request_id for call in calls}) == 3
    assert all(call.scales is not None and call.scales.shape == (len(call.hidden), 2) for call in calls)
    assert all((call.expert_ids == -1).all() for call in calls)


@pytest.mark.parametrize("parts", [1, 3])
async def test_the_raw_socket_moves_all_bytes_of_what_no_buffer_holds(parts: int) -> None:
    async with running_echo() as echo:
        seconds = raw_socket_seconds(echo.raw, Exchange(8 << 20, 16 << 20, parts), 2)
    assert len(seconds) == 2
    assert all(one > 0 for one in seconds)
