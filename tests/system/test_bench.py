"""`expertd bench serve` against a server of its own: every transport beside the floors, as table, JSON and picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fence.markers import no_gpu

PNG = b"\x89PNG\r\n\x1a\n"
EXPERTD = (sys.executable, "-P", "-m", "expertd.cli", "bench", "serve")


def bench(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [*EXPERTD, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_every_transport_is_measured_and_drawn_beside_the_floors(tmp_path: Path) -> None:
    file, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    ended = bench(
        tmp_path,
        *("--hidden-size", "256", "--intermediate-size", "128", "--backend", "torch"),
        *("--tokens", "1", "20", "--callers", "1", "2", "--seconds", "0.05"),
        *("--json", str(file), "--plot", str(picture)),
    )
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stderr.splitlines() if not line.startswith("measuring")] == []
    rows = json.loads(file.read_text())["rows"]
    floors = {(name, tokens, 1) for name in ("grpc echo", "raw socket", "memcpy") for tokens in (1, 20)}
    transports = {
        (f"expertd {name}", tokens, callers)
        for name in ("grpc", "unix", "shm")
        for tokens in (1, 20)
        for callers in (1, 2)
    }
    assert {(row["what"], row["tokens"], row["callers"]) for row in rows} == floors | transports
    assert all(0 < row["p50"] <= row["p99"] and row["gigabytes_per_second"] > 0 for row in rows)
    assert all(row["stages"]["compute"] > 0 for row in rows if row["what"].startswith("expertd"))
    p50 = {(row["what"], row["tokens"]): row["p50"] for row in rows}
    for row in rows:
        if row["what"].startswith("expertd") and row["callers"] == 1:
            moved = p50["raw socket" if row["what"] == "expertd shm" else "grpc echo", row["tokens"]]
            floor = moved + row["stages"]["compute"]
            assert row["over_floor"] == pytest.approx(row["p50"] / floor)
            assert row["call_over_floor"] == pytest.approx(row["call_p50"] / floor)
        else:
            assert row["over_floor"] is row["call_p50"] is row["call_over_floor"] is None
    assert "expertd shm" in ended.stdout
    assert picture.read_bytes().startswith(PNG)


@no_gpu
def test_memory_of_a_gpu_is_not_measured_without_one(tmp_path: Path) -> None:
    ended = bench(
        tmp_path,
        *("--hidden-size", "256", "--intermediate-size", "128", "--backend", "torch"),
        *("--transport", "cuda"),
    )
    assert ended.returncode == 2
    assert "expertd bench serve: error: --transport cuda: torch sees no GPU here" in ended.stderr


def test_a_transport_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    ended = bench(tmp_path, "--servers", "127.0.0.1:1", "--transport", "unix")
    assert ended.returncode == 2
    assert "expertd bench serve: error: --transport unix is of its own server" in ended.stderr
    assert "Traceback" not in ended.stderr
