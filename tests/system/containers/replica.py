"""Servers in containers that have addresses of their own, and what can go wrong between them and a coordinator."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.system.containers.docker_engine import DOCKER, Engine

NETWORK = "faults"
SUBNET = "10.204.0.0/24"
GATEWAY = "10.204.0.1"
"""The coordinator's address, and that of anything else in the namespace."""
PORT = 50051
BURST_BYTES = 16 << 10
"""What a slow link lets through at once after a pause."""
READ_TOKENS = """
import urllib.request
lines = urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=5).read().decode().splitlines()
print(sum(float(line.split()[-1]) for line in lines if line.startswith("expertd_tokens_total")))
"""


@contextmanager
def network(engine: Engine) -> Iterator[None]:
    """The bridge that all replicas are on."""
    # Left behind by tests that were killed.
    engine.run(DOCKER, "network", "rm", NETWORK)
    engine.docker("network", "create", "--subnet", SUBNET, "--gateway", GATEWAY, NETWORK)
    try:
        yield
    finally:
        engine.docker("network", "rm", NETWORK)


@dataclass(frozen=True, slots=True)
class Replica:
    """One server; its address outlives restarts."""

    engine: Engine
    name: str
    address: str
    experts: str

    @property
    def target(self) -> str:
        return f"{self.address}:{PORT}"

    def create(self, model: Path) -> None:
        """Start it for the first time, without waiting for it."""
        self.engine.docker(
            *("run", "--detach", "--name", self.name, "--network", NETWORK, "--ip", self.address),
            *("--volume", f"{model}:/models:ro", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL"),
            *("--stop-timeout=40", "--no-healthcheck", "expertd:cpu", "serve", "--model=/models", "--backend=torch"),
            *("--threads=1", "--experts", self.experts, f"--listen=0.0.0.0:{PORT}", "--insecure"),
            "--metrics=0.0.0.0:9464",
        )

    def remove(self) -> None:
        self.engine.run(DOCKER, "rm", "--force", "--volumes", self.name)

    def docker(self, command: str, *options: str) -> None:
        """`docker command` on the container."""
        self.engine.docker(command, *options, self.name)

    def exit_code(self) -> int:
        return int(self.engine.docker("inspect", "--format={{.State.ExitCode}}", self.name))

    def tokens(self) -> float:
        """Tokens since its start, 0 while it does not answer."""
        asked = self.engine.run(DOCKER, "exec", self.name, "python3", "-c", READ_TOKENS)
        return float(asked.stdout) if asked.returncode == 0 else 0.0

    def until_serving(self, seconds: float = 60.0) -> None:
        """Wait until its health says SERVING. Raises `AssertionError`."""
        deadline = time.monotonic() + seconds
        while self.engine.run(DOCKER, "exec", self.name, "expertd", "health", f"127.0.0.1:{PORT}").returncode != 0:
            assert time.monotonic() < deadline, f"{self.name} does not serve within {seconds} s:\n{self.log()}"
            time.sleep(0.2)

    def until_used(self, seconds: float = 60.0) -> None:
        """Wait until it computes tokens that it had not before. Raises `AssertionError`."""
        before, deadline = self.tokens(), time.monotonic() + seconds
        while self.tokens() <= before:
            assert time.monotonic() < deadline, f"{self.name} is not used within {seconds} s:\n{self.log()}"
            time.sleep(0.2)

    def log(self) -> str:
        return self.engine.run(DOCKER, "logs", "--tail=20", self.name).stdout

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Without its network, with the same address afterwards."""
        self.engine.docker("network", "disconnect", NETWORK, self.name)
        try:
            yield
        finally:
            self.engine.docker("network", "connect", "--ip", self.address, NETWORK, self.name)

    @contextmanager
    def packets(self, *verdict: str) -> Iterator[None]:
        """`verdict`, as iptables understands it, on packets both ways. Raises `AssertionError` if it met none."""
        rules = (("OUTPUT", "--destination"), ("INPUT", "--source"))
        for chain, side in rules:
            self.engine.network_tool("iptables", "--insert", chain, side, self.address, "--protocol", "tcp", *verdict)
        try:
            yield
        finally:
            shown = self.engine.network_tool("iptables", "--list", "OUTPUT", "1", "--numeric", "--verbose", "--exact")
            for chain, _ in rules:
                self.engine.network_tool("iptables", "--delete", chain, "1")
        assert int(shown.split()[0]) > 0, f"no packet to {self.name} met the rule: {shown}"

    @contextmanager
    def slow_link(self, rate: str) -> Iterator[None]:
        """At most `rate`, as tc understands it, towards it. Raises `AssertionError` if nothing had to wait."""
        index = self.engine.docker("exec", self.name, "cat", "/sys/class/net/eth0/iflink").strip()
        links = self.engine.network_tool("ip", "-oneline", "link").splitlines()
        (device,) = (line.split()[1].split("@")[0] for line in links if line.startswith(f"{index}:"))
        tbf = f"root tbf rate {rate} burst {BURST_BYTES}b latency 200ms"
        self.engine.network_tool("tc", "qdisc", "add", "dev", device, *tbf.split())
        try:
            yield
        finally:
            shown = self.engine.network_tool("tc", "-statistics", "qdisc", "show", "dev", device)
            self.engine.network_tool("tc", "qdisc", "delete", "dev", device, "root")
        assert "overlimits 0 " not in shown, f"the link to {self.name} was fast enough: {shown}"
