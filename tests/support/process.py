"""One server in a process of its own, as `expertd serve` makes it, that nothing but the test waits for."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

OPTIONS = ("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--backend", "torch", "--threads", "1")
AS_IT_IS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that is ready, and where it listens."""

    process: subprocess.Popen[bytes]
    listen: str
    metrics: str

    @property
    def site(self) -> str:
        return f"http://{self.metrics}"


@contextlib.contextmanager
def serving(
    model: Path,
    folder: Path,
    *options: str,
    constants: Mapping[str, object] = AS_IT_IS,
    environment: Mapping[str, str] = AS_IT_IS,
    stderr: int = subprocess.DEVNULL,
) -> Iterator[Serving]:
    """A server of all 16 experts with other `constants`, named as module.NAME; drained at the end, if it can be."""
    setting = "".join(
        f"import expertd.server.{name.rpartition('.')[0]} as module; module.{name.rpartition('.')[2]} = {value!r}\n"
        for name, value in constants.items()
    )
    program = f"{setting}import sys; from expertd.cli import main; sys.exit(main())"
    ready = folder / "ready.json"
    command = [sys.executable, "-P", "-c", program, "serve", "--model", str(model), "--experts", "0-15", *OPTIONS]
    command += ["--ready-file", str(ready), *options]
    with subprocess.Popen(command, stderr=stderr, env=os.environ | environment) as process:
        try:
            deadline = time.monotonic() + 60
            while not ready.exists():
                assert process.poll() is None, f"exit code {process.returncode}"
                assert time.monotonic() < deadline, "it is not ready"
                time.sleep(0.05)
            bound = json.loads(ready.read_text())
            yield Serving(process, bound["listen"], bound["metrics"])
        finally:
            end(process, 20)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def end(process: subprocess.Popen[bytes], timeout: float) -> None:
    """Ask it to end, and kill it when it has not within `timeout` seconds."""
    process.terminate()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()


def said_until(process: subprocess.Popen[str], words: str) -> str:
    """What it prints up to a line with `words`; its complaints are the test's if it ends before."""
    assert process.stdout is not None
    said = ""
    while words not in said:
        line = process.stdout.readline()
        assert line, process.stderr and process.stderr.read()
        said += line
    return said
