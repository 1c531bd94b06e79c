"""Servers in containers under load that are killed, frozen, cut off, reset, delayed, slowed, restarted and drained.

Two replicas of each half of the experts; the load runs in the network namespace of the engine, where each replica has
an address, and compares every answer with the FP32 reference.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from tests.chaos.load import SIZES
from tests.support.families import SMALL
from tests.system.containers.docker_engine import ROOT, Engine
from tests.system.containers.replica import BURST_BYTES, GATEWAY, Replica, network

EXPERTS = ("0-7", "0-7", "8-15", "8-15")
FAULT_SECONDS = 4.0
"""Longer than `attempt_timeout` of the load."""
LEAST_CALLS = 100
LOSS = ("--match", "statistic", "--mode", "random", "--probability", "0.1", "--jump", "DROP")
# But for resets themselves, which have to arrive.
RESET = ("--tcp-flags", "RST", "NONE", "--jump", "REJECT", "--reject-with", "tcp-reset")
DELAY_SECONDS = 0.04
LINK_BYTES = 15_625
"""A second, of a slow link."""
SLOWEST_SECONDS = (max(SIZES) * SMALL.hidden_size * 2 - BURST_BYTES) / LINK_BYTES
"""What the hidden states of the largest request take there at least, in bfloat16: longer than any call on a busy
machine."""
Replicas = list[Replica]


@pytest.fixture(scope="module")
def replicas(engine: Engine, small_model: Path) -> Iterator[Replicas]:
    for file in small_model.iterdir():
        # The containers run as another user.
        file.chmod(0o644)
    started = [Replica(engine, f"replica-{n}", f"10.204.0.{10 + n}", experts) for n, experts in enumerate(EXPERTS)]
    for replica in started:
        # Left behind by tests that were killed.
        replica.remove()
    with network(engine):
        try:
            for replica in started:
                replica.create(small_model)
            for replica in started:
                replica.until_serving()
            yield started
        finally:
            for replica in started:
                replica.remove()


@dataclass(slots=True)
class Outcome:
    """What the load said when it ended."""

    exit_code: int = -1
    printed: str = ""

    def count(self, what: str) -> int:
        found = re.search(rf"(\d+) {what}", self.printed)
        assert found, f"the load does not say how many {what}: {self.printed}"
        return int(found[1])

    @property
    def slowest(self) -> float:
        """Seconds of the call that took longest."""
        found = re.search(r"max (\d+) ms", self.printed)
        assert found, f"the load does not say how long calls took: {self.printed}"
        return int(found[1]) / 1e3


@contextmanager
def load(engine: Engine, model: Path, name: str, servers: list[str]) -> Iterator[Outcome]:
    """Load from within the engine's namespace; how it went is known when the block has been left."""
    options = [
        "--servers",
        *servers,
        "--model",
        str(model),
        "--seconds=600",
        f"--name={name}",
        f"--least={LEAST_CALLS}",
    ]
    command = engine.inside(sys.executable, "-m", "tests.chaos.load", *options)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        outcome = Outcome()
        try:
            yield outcome
        finally:
            process.terminate()
            try:
                outcome.printed, _ = process.communicate(timeout=60)
            finally:
                process.kill()
            outcome.exit_code = process.returncode
            print(f"\n{outcome.printed}", end="")


@contextmanager
def relay(listen: str, target: str, *python: str) -> Iterator[str]:
    """The address of a long way to `target`."""
    options = [listen, target, f"--delay={DELAY_SECONDS}", "--jitter=0.02"]
    command = [*python, "-m", "tests.system.containers.relay", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def kill(replicas: Replicas) -> None:
    replicas[0].docker("kill")
    time.sleep(1.0)
    replicas[0].docker("start")


def freeze(replicas: Replicas) -> None:
    replicas[1].docker("pause")
    time.sleep(FAULT_SECONDS)
    replicas[1].docker("unpause")


def partition(replicas: Replicas) -> None:
    with replicas[2].packets("--jump", "DROP"):
        time.sleep(FAULT_SECONDS)


def unplug(replicas: Replicas) -> None:
    with replicas[3].unplugged():
        time.sleep(FAULT_SECONDS)


def reset(replicas: Replicas) -> None:
    with replicas[0].packets(*RESET):
        time.sleep(2.0)


def slow_down(replicas: Replicas) -> None:
    with replicas[2].slow_link(f"{LINK_BYTES * 8}bit"):
        time.sleep(FAULT_SECONDS)


def restart(replicas: Replicas) -> None:
    replicas[3].docker("restart")


def drain_each(replicas: Replicas) -> None:
    for replica in replicas:
        replica.docker("stop")
        assert replica.exit_code() == 0
        replica.docker("start")
        replica.until_used()


FAULTS = (kill, freeze, partition, unplug, reset, slow_down, restart, drain_each)
UNANSWERED = (freeze, partition, unplug)
"""Those during which a replica is silent: calls meet that and are repeated, unless it was so slow that it had none."""


@pytest.mark.parametrize("fault", FAULTS)
def test_no_call_fails_while_every_expert_has_a_sound_replica(
    engine: Engine, replicas: Replicas, small_model: Path, fault: Callable[[Replicas], None]
) -> None:
    with load(engine, small_model, fault.__name__, [replica.target for replica in replicas]) as outcome:
        for replica in replicas:
            replica.until_used()
        fault(replicas)
        for replica in replicas:
            replica.until_used()
    assert outcome.exit_code == 0
    assert outcome.count("violations") == 0
    assert outcome.count("errors") == 0
    assert outcome.count("retries") > 0 or "no sign of life" in outcome.printed or fault not in UNANSWERED
    assert outcome.slowest >= SLOWEST_SECONDS or fault is not slow_down


def test_a_replica_that_is_far_away_and_loses_packets_is_late_not_wrong(
    engine: Engine, replicas: Replicas, small_model: Path
) -> None:
    far = replicas[1]
    with relay(f"{GATEWAY}:0", far.target, *engine.inside(sys.executable)) as address:
        servers = [address if replica is far else replica.target for replica in replicas]
        with load(engine, small_model, "delay and loss", servers) as outcome:
            far.until_used()
            with far.packets(*LOSS):
                time.sleep(FAULT_SECONDS)
            far.until_used()
    assert outcome.exit_code == 0
    assert outcome.count("violations") == 0
    assert outcome.count("errors") == 0


def test_without_any_replica_calls_end_in_an_error_and_recover(
    engine: Engine, replicas: Replicas, small_model: Path
) -> None:
    with load(engine, small_model, "both replicas killed", [replica.target for replica in replicas]) as outcome:
        for replica in replicas:
            replica.until_used()
        for replica in replicas[:2]:
            replica.docker("kill")
        # Longer than `owner_timeout` of the load.
        time.sleep(8.0)
        for replica in replicas[:2]:
            replica.docker("start")
        for replica in replicas:
            replica.until_used()
    assert outcome.exit_code == 0
    assert outcome.count("violations") == 0
    assert outcome.count("errors") > 0
    assert "no server that can be reached owns experts 0, " in outcome.printed


def test_the_relay_is_late_in_both_directions() -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:
        host, port = target.getsockname()
        with relay("127.0.0.1:0", f"{host}:{port}", sys.executable) as address:
            relayed_host, relayed_port = address.split(":")
            with socket.create_connection((relayed_host, int(relayed_port))) as caller, target.accept()[0] as called:
                for source, sink in ((caller, called), (called, caller)):
                    started = time.monotonic()
                    source.sendall(b"late")
                    assert sink.recv(4) == b"late"
                    assert time.monotonic() - started >= DELAY_SECONDS


def test_the_load_notices_wrong_answers(engine: Engine, replicas: Replicas, tmp_path: Path) -> None:
    other = write_demo_checkpoint(tmp_path, replace(SMALL, seed=1))
    with load(engine, other, "other weights", [replica.target for replica in replicas]) as outcome:
        for replica in replicas:
            replica.until_used()
    assert outcome.exit_code == 1
    assert outcome.count("violations") > 0
