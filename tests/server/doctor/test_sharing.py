"""What `expertd doctor` says of MPS and of GPUs that reach each other, with pipes, sockets and GPUs that stand in."""

import os
import socket
from pathlib import Path

import pytest
import torch

from expertd.server.doctor import sharing
from expertd.server.options.config import ServerConfig


def test_without_a_daemon_it_says_what_that_costs_and_what_to_do(tmp_path: Path) -> None:
    finding = sharing.check_mps(tmp_path / "none")
    assert finding.level == "warn"
    assert f"in {tmp_path / 'none'}:" in finding.text
    assert "takes about 2.5 ms in place of 0.07 ms" in finding.text
    assert "`nvidia-cuda-mps-control -d`" in finding.text


def test_the_environment_says_where_the_pipe_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert f"in {tmp_path}:" in sharing.check_mps().text
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY")
    assert "/tmp/nvidia-mps" in sharing.check_mps().text


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_socket_counts_as_long_as_somebody_listens_who_hears_nothing(tmp_path: Path, kind: socket.SocketKind) -> None:
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX, kind) as daemon:
        daemon.bind(str(path))
        daemon.listen()
        assert sharing.check_mps(tmp_path).level == "ok"
        daemon.setblocking(False)
        with pytest.raises(BlockingIOError):
            daemon.accept()
    assert path.is_socket()
    assert sharing.check_mps(tmp_path).level == "warn"


def test_a_named_pipe_counts_as_long_as_somebody_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "control"
    os.mkfifo(path)
    assert sharing.check_mps(tmp_path).level == "warn"
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert sharing.check_mps(tmp_path).level == "ok"
    os.close(reader)
    path.unlink()
    path.write_text("")
    assert sharing.check_mps(tmp_path).level == "warn", "a file is no pipe"


def test_gpus_that_do_not_reach_each_other_are_named() -> None:
    alone = sharing.check_reach(1, lambda *_: False)
    assert (alone.level, "share memory with it where NVLink or PCIe" in alone.text) == ("ok", True)
    assert sharing.check_reach(8, lambda *_: True).text == "each of the 8 GPUs reaches the memory of all others"
    finding = sharing.check_reach(3, lambda gpu, other: {gpu, other} == {0, 1})
    assert finding.level == "warn"
    assert finding.text.startswith("0 reaches 1; 1 reaches 0; 2 reaches none: calls between the others go through host")


def test_they_are_looked_for_where_a_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def checks(backend: str) -> list[str]:
        config = ServerConfig(model=Path("m"), experts=(0,), backend=backend)
        return [finding.check for finding in sharing.check_sharing(config)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    assert checks("torch") == []
    assert checks("auto") == ["mps", "gpu peers"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checks("auto") == []
