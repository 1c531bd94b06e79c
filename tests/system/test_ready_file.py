"""--ready-file: there while the server serves, and at no other time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.process import OPTIONS, serving


def serve(model: Path, *options: str) -> list[str]:
    command = [sys.executable, "-P", "-m", "expertd.cli", "serve", "--model", str(model), "--experts", "0-15"]
    return [*command, *OPTIONS, *options]


@pytest.mark.parametrize("place", ["/proc/ready.json", "folder"])
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_loaded(
    small_model: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "folder").mkdir()
    ready = tmp_path / place
    ended = subprocess.run(
        serve(small_model, "--ready-file", str(ready)), capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert f"expertd serve: error: --ready-file {ready} cannot be written" in ended.stderr
    assert "loading" not in ended.stderr


def test_what_a_crash_left_behind_goes_before_the_weights_are_loaded(small_model: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    with serving(small_model, tmp_path) as server:
        server.process.kill()
        server.process.wait(10)
    assert ready.exists()
    with subprocess.Popen(serve(small_model, "--ready-file", str(ready)), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while b"loading layers" not in process.stderr.readline():
            assert process.poll() is None
        assert not ready.exists() or json.loads(ready.read_text())["listen"] != server.listen
        process.terminate()
        process.communicate(timeout=30)
    assert not ready.exists()
