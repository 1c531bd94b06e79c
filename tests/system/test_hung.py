"""A server of which one thread hangs: liveness says so, and metrics can still be read."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.support.process import serving
from tests.support.stopped_thread import stopped, thread_of

BOUND = 10.0
"""Seconds within which a probe is answered."""


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=BOUND) as answer:
            return answer.status, str(answer.read(), "utf-8")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, str(error.read(), "utf-8")


def health(url: str) -> subprocess.CompletedProcess[str]:
    """What the image's health check does."""
    command = [sys.executable, "-P", "-m", "expertd.cli", "health", url, "--timeout", "20"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("thread", "what"), [("", "event loop"), ("expertd-engine", "engine")])
def test_a_thread_that_hangs_fails_the_probes_and_not_the_metrics(
    small_model: Path, tmp_path: Path, thread: str, what: str
) -> None:
    with serving(small_model, tmp_path) as server:
        process, site = server.process, server.site
        assert get(f"{site}/healthz") == (200, "alive\n")
        with stopped(thread_of(process.pid, thread) if thread else process.pid):
            for _ in range(2):
                code, text = get(f"{site}/healthz")
                assert code == 503
                assert text == f"the {what} has not answered within 5 s; restart the server\n"
            ended = health(f"{site}/readyz")
            assert ended.returncode == 1
            assert f"the {what} has not answered" in ended.stdout
            started = time.monotonic()
            assert "expertd_ready 1.0" in get(f"{site}/metrics")[1]
            assert time.monotonic() - started < 2
        assert get(f"{site}/healthz") == (200, "alive\n")
        assert health(f"{site}/readyz").stdout == f"{site}/readyz: ready\n"
    assert process.returncode == 0
