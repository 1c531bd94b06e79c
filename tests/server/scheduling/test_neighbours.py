"""Servers of one machine: that they see each other, what each takes, and that what waits does not spin."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from expertd.server.doctor.host import check_cpus
from expertd.server.scheduling.neighbours import CpuShare, announced, count_servers
from tests.support.process import serving


def test_a_server_is_seen_as_long_as_it_lives() -> None:
    before = count_servers()
    with announced():
        assert count_servers() == before + 1
    assert count_servers() == before


@pytest.mark.parametrize(("servers", "fair"), [(1, 8), (2, 4), (3, 2), (9, 1)])
def test_servers_share_the_cpus(servers: int, fair: int) -> None:
    here = {"cpus": 8, "others": servers - 1, "most": 64}
    assert CpuShare.of(None, **here).threads == fair
    assert not CpuShare.of(None, **here).crowded
    assert CpuShare.of(5, **here).threads == 5


def test_doctor_warns_of_more_threads_than_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"cpus": 4, "others": 1, "most": 64}
    told = check_cpus(CpuShare.of(4, **here))
    assert (told.level, "beside 1 other" in told.text) == ("warn", True)
    assert check_cpus(CpuShare.of(None, **here)).level == "ok"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "unset it" in check_cpus(CpuShare.of(None, **here)).text


def test_a_second_server_notices_the_first_and_both_wait_passively(small_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-P", "-m", "expertd.cli", "serve", "--model", str(small_model), "--experts", "0-15"]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--backend", "torch", "--ready-file"]
    with serving(small_model, tmp_path), log.open("wb") as stderr:
        # OpenMP tells what it goes by when torch loads it.
        command = ["env", "OMP_DISPLAY_ENV=verbose", *command, str(tmp_path / "second.json")]
        with subprocess.Popen(command, stderr=stderr) as second:
            try:
                while "serving on" not in log.read_text():
                    time.sleep(0.05)
                    assert second.poll() is None, log.read_text()
            finally:
                second.terminate()
    told = log.read_text()
    assert "GOMP_SPINCOUNT = '0'" in told
    assert "beside 0 other" not in told
    assert " other servers here" in told
