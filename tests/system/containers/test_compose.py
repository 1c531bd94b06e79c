"""The compose file with its CPU override, for real: eight servers, a coordinator, monitors, a kill, a stop."""

import json
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.containers.docker_engine import ROOT, Engine

SERVERS = [f"server-{index}" for index in range(8)]
FILES = ("deploy/compose.yaml", "deploy/compose.cpu.yaml")

NOT_HERE = (
    "_coordinator_",
    "_device_",
    "_gpu_",
    "_certificate_",
    "_expert_pairs_",
    "_placement_update",
    "_generation_",
)
"""Of scraped coordinators, of GPUs, and of servers with TLS, --per-expert-metrics or --admin-listen."""


class Fleet:
    """The services of the compose files, in the tests' engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def compose(self, *arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        program = str(Path(sys.executable).parent / "docker-compose")
        files = [word for file in FILES for word in ("--file", str(ROOT / file))]
        return self._engine.run(program, "--ansi=never", "--progress=plain", *files, *arguments, timeout=timeout)

    def succeed(self, *arguments: str, timeout: float = 900) -> str:
        done = self.compose(*arguments, timeout=timeout)
        assert done.returncode == 0, f"compose {' '.join(arguments)}: {done.stdout[-6000:]}"
        return done.stdout

    def states(self, template: str) -> list[str]:
        """What `docker inspect` says of each server, in order."""
        names = [f"expertd-{server}-1" for server in SERVERS]
        return self._engine.docker("inspect", f"--format={template}", *names).split()

    def get(self, service: str, url: str) -> Any:  # noqa: ANN401
        """The JSON at `url`, asked for from within the container of `service`."""
        return json.loads(self.succeed("exec", "--no-TTY", service, "wget", "-q", "-O", "-", url))

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that Prometheus answers."""
        query = urllib.parse.urlencode({"query": expression})
        result: list[dict[str, Any]] = self.get("prometheus", f"http://127.0.0.1:9090/api/v1/query?{query}")["data"][
            "result"
        ]
        return result


@pytest.fixture(scope="module")
def fleet(engine: Engine) -> Iterator[Fleet]:
    """Eight healthy servers with Prometheus and Alertmanager; Grafana's image is not to be had without a registry."""
    fleet = Fleet(engine)
    try:
        fleet.succeed("up", "--detach", "--wait", "--no-build", *SERVERS, "prometheus", "alertmanager")
        yield fleet
    finally:
        fleet.succeed("down", "--volumes", "--timeout", "40")


def until(condition: Callable[[], bool], seconds: float = 120, describe: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in time {describe()}"
        time.sleep(2)


def server_expressions() -> Iterator[str]:
    """PromQL of the dashboards, with Grafana's variables filled in, as far as these servers have what it asks for."""
    for file in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                if not any(part in target["expr"] for part in NOT_HERE):
                    yield target["expr"].replace("$__rate_interval", "5m").replace("$instance", "server-0:9464")


def test_every_server_is_healthy(fleet: Fleet) -> None:
    assert fleet.states("{{.State.Health.Status}}") == ["healthy"] * 8
    assert fleet.states("{{.HostConfig.ReadonlyRootfs}}") == ["true"] * 8


def test_a_coordinator_beside_them_agrees_with_transformers(fleet: Fleet) -> None:
    shown = fleet.succeed("run", "--rm", "--no-TTY", "demo")
    assert shown.count(": ok") == 6
    assert "every result agrees, with 8 servers" in shown


def test_prometheus_sees_all_of_them_with_data(fleet: Fleet) -> None:
    until(lambda: len(fleet.query('up{job="expertd"} == 1')) == 8)
    until(lambda: all(float(series["value"][1]) > 0 for series in fleet.query("expertd_tokens_total")))
    assert len(fleet.query("expertd_tokens_total")) == 8
    groups = fleet.get("prometheus", "http://127.0.0.1:9090/api/v1/rules")["data"]["groups"]
    assert all(rule["health"] == "ok" for group in groups for rule in group["rules"])


def test_every_panel_about_servers_has_data(fleet: Fleet) -> None:
    waiting = set(server_expressions())
    assert len(waiting) > 30

    def all_have_data() -> bool:
        for expression in tuple(waiting):
            if {series["value"][1] for series in fleet.query(expression)} - {"NaN"}:
                waiting.discard(expression)
        return not waiting

    until(all_have_data, describe=lambda: f"without data: {sorted(waiting)}")


def test_a_killed_server_raises_its_alert_until_it_is_back(fleet: Fleet) -> None:
    def firing() -> list[str]:
        alerts = fleet.get("alertmanager", "http://127.0.0.1:9093/api/v2/alerts?active=true")
        return [alert["labels"]["instance"] for alert in alerts if alert["labels"]["alertname"] == "ExpertdServerDown"]

    assert firing() == []
    fleet.succeed("kill", "server-3")
    until(lambda: firing() == ["server-3:9464"], seconds=240)
    answer = fleet.compose("run", "--rm", "--no-TTY", "demo")
    assert answer.returncode == 1
    assert "server-3:50051" in answer.stdout
    fleet.succeed("up", "--detach", "--wait", "--no-build", "server-3")
    until(lambda: len(fleet.query('up{job="expertd"} == 1')) == 8)


def test_all_servers_drain_and_exit_0_when_stopped(fleet: Fleet) -> None:
    fleet.succeed("stop", *SERVERS)
    assert fleet.states("{{.State.ExitCode}}") == ["0"] * 8
    logs = fleet.succeed("logs", "--no-color", *SERVERS)
    assert logs.count("draining for at most 30 s") >= 8
    assert logs.count("stopped") >= 8
    assert "Traceback" not in logs
