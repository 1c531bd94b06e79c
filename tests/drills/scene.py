"""What a drill plays on: servers that a real Prometheus watches, a coordinator that calls them, a shell."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.fleet.discovery import FileServers
from expertd.client.telemetry.metrics import CoordinatorMetrics
from expertd.client.transport.security import ClientSecurity
from expertd.proto.base.errors import ExpertdError
from tests.docs.fences import ROOT, Fence
from tests.support.coordinators import EXPERTS as ROUTED
from tests.support.coordinators import LAYER, routing, tokens
from tests.support.process import free_port
from tests.support.programs import find_program

RULES = sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
MANUAL, MARK = ROOT / "docs/operations.md", "run by tests/drills/test_drills.py"
PROMPT_SECONDS = 120
"""From an incident to its alert, at most."""
EXPERTS = {"node0": "0-7", "node1": "8-15", "node2": "8-15", "node3": "0-7"}
SERVERS = "servers.txt"
"""The file that coordinators have them from."""
STARTED, TO_COME = ("node0", "node1", "node2"), "node3"
OF_THE_MACHINE = {
    "ExpertdSlow",
    "ExpertdCallsSlow",
    "ExpertdLatencyBudgetBurns",
    "ExpertdQueueWaits",
    "ExpertdServerHot",
    "ExpertdServerLags",
}
"""Alerts for times, which where tests share processors say nothing of an incident unless it is about times."""
LASTING = {"ExpertdServersUneven"}
"""Alerts for loads that are uneven for half an hour: here they are so on purpose."""
HOT = 7
"""An expert of node0."""
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(slots=True)
class Scene:
    """Three servers of one model: node0 alone has the lower half of its experts, the others share the upper half.

    A fourth, node3, for which there is a place, is started by whoever wants it.
    """

    folder: Path
    model: Path
    security: ClientSecurity | None
    options: tuple[str, ...]
    environment: Mapping[str, str]
    """Of all that is started."""
    ports: dict[str, int] = field(default_factory=dict)
    """By the name and port that documents have: node0:50051, node0:9464."""
    moe: Coordinator = field(init=False)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    failed_calls: list[ExpertdError] = field(default_factory=list)
    calls: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def local(self, text: str) -> str:
        """A document's text with what its names stand for here."""
        for name, port in self.ports.items():
            text = text.replace(name, f"127.0.0.1:{port}")
        for theirs, ours in {"0-127": EXPERTS["node0"], "128-255": EXPERTS["node1"]}.items():
            text = text.replace(f"--experts {theirs}", f"--experts {ours} --backend torch --threads 1")
        return text.replace("--slots 128", "--slots 8").replace("/models/DeepSeek-V3", str(self.model))

    def start(self, node: str, model: Path | None = None, environment: Mapping[str, str] = NOTHING) -> None:
        command = [
            *(sys.executable, "-P", "-m", "expertd.cli", "serve", "--model", str(model or self.model)),
            *("--experts", EXPERTS[node], "--backend", "torch", "--threads", "1", *self.options),
            *("--listen", self.local(f"{node}:50051"), "--metrics", self.local(f"{node}:9464")),
        ]
        with (self.folder / f"{node}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment(environment))
        self.processes.append(process)
        (self.folder / f"{node}.pid").write_text(str(process.pid))

    def _environment(self, more: Mapping[str, str] = NOTHING) -> dict[str, str]:
        return {**os.environ, **self.environment, **more}

    async def stop(self, node: str) -> None:
        """Drain a server, whoever started it; one that is gone is none, nor is one that never was."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            pid = int((self.folder / f"{node}.pid").read_text())
            os.kill(pid, signal.SIGTERM)
            await until(partial(self._ended, pid), 30)

    def _ended(self, pid: int) -> bool:
        # All that have ended are reaped, also those that a shell stopped.
        running = [process.pid for process in self.processes if process.poll() is None]
        if pid in running:
            return False
        # A shell's, which has ended: whoever adopts it reaps it.
        return not Path(f"/proc/{pid}").exists()

    async def ready(self, node: str) -> None:
        await until(lambda: self.get(f"http://{self.local(f'{node}:9464')}/readyz") is not None, 90)

    def get(self, url: str) -> bytes | None:
        """None while nobody answers there, or with an error."""
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bytes(answer.read())
        except OSError:
            return None

    def ask(self, path: str, **parameters: str) -> Any:  # noqa: ANN401
        """Data of Prometheus; None while it does not answer."""
        answer = self.get(self.local(f"http://prometheus:9090/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
        return None if answer is None else json.loads(answer)["data"]

    def firing(self) -> set[str]:
        """All alerts but those of the machine, and of what is to last longer than an incident."""
        return {labels["alertname"] for labels in self._alerts()} - OF_THE_MACHINE - LASTING

    def blamed(self, alert: str) -> set[str]:
        """Instances for which an alert fires, also one of the machine."""
        return {labels["instance"] for labels in self._alerts() if labels["alertname"] == alert}

    def _alerts(self) -> list[dict[str, str]]:
        alerts = (self.ask("alerts") or {"alerts": ()})["alerts"]
        return [alert["labels"] for alert in alerts if alert["state"] == "firing"]

    def value(self, expression: str) -> float | None:
        """Of the first series; None where there is none."""
        result = (self.ask("query", query=expression) or {"result": ()})["result"]
        return float(result[0]["value"][1]) if result else None

    def shell(self, script: str, *, check: bool = True) -> str:
        """What a document's commands say, run in the drill's folder."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.local(script)],
            cwd=self.folder,
            env=self._environment({"PATH": path}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout + done.stderr

    async def call(self, pause: float = 0.05, *, hot: bool = False) -> None:
        """Call for ever; `hot`: with tokens that all go to one expert, and to others of its server."""
        while True:
            self.calls += 1
            ids, weights = routing(20, self.calls)
            if hot:
                others = torch.rand(20, HOT, generator=torch.Generator().manual_seed(self.calls)).argsort(dim=1)
                ids = torch.cat((torch.full((20, 1), HOT), others[:, : ids.shape[1] - 1]), dim=1)
            try:
                await self.moe(LAYER, tokens(20, self.calls), topk_ids=ids, topk_weights=weights)
            except ExpertdError as error:
                self.failed_calls.append(error)
            await asyncio.sleep(pause)

    @contextlib.asynccontextmanager
    async def calling(self, *calls: Coroutine[None, None, None]) -> AsyncIterator[None]:
        """They go on during the block."""
        tasks = [asyncio.create_task(one) for one in calls]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def log(self, node: str) -> str:
        return (self.folder / f"{node}.log").read_text(errors="replace")


def commands(title: str) -> tuple[str, ...]:
    """The fences of a section of docs/operations.md, which say that the drills run them."""
    section = MANUAL.read_text().partition(f"\n### {title}\n")[2]
    section = re.split(r"\n##+ ", section)[0]
    return tuple(fence.code for fence in Fence.all_of(section) if fence.mark == MARK)


async def until(true: Callable[[], bool], seconds: float = PROMPT_SECONDS, describe: Callable[[], str] = str) -> float:
    """Wait for it; how long it took."""
    started = time.monotonic()
    while not await asyncio.to_thread(true):
        assert time.monotonic() < started + seconds, f"not within {seconds} s {describe()}"
        await asyncio.sleep(0.25)
    return time.monotonic() - started


@contextlib.asynccontextmanager
async def playing(
    folder: Path,
    model: Path,
    *options: str,
    security: ClientSecurity | None = None,
    environment: Mapping[str, str] = NOTHING,
) -> AsyncIterator[Scene]:
    """The scene with everything well, no alert, and calls all the time; everything is ended after the block."""
    prometheus = find_program("prometheus", package="prometheus")
    scene = Scene(folder, model, security, options, environment)
    for name in (*(f"{node}:{port}" for node in EXPERTS for port in (50051, 9464)), "prometheus:9090"):
        scene.ports[name] = free_port()
    (folder / SERVERS).write_text("".join(scene.local(f"{node}:50051\n") for node in STARTED))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(scene.stop, TO_COME)
        for node in STARTED:
            scene.start(node)
            stack.push_async_callback(scene.stop, node)
        for node in STARTED:
            await scene.ready(node)
        exporter, thread = start_http_server(0, "127.0.0.1", scene.registry)
        stack.callback(thread.join)
        stack.callback(exporter.server_close)
        stack.callback(exporter.shutdown)
        _configure(scene, exporter.server_port)
        await stack.enter_async_context(_watching(prometheus, scene))
        config = CoordinatorConfig(metrics=CoordinatorMetrics(scene.registry), security=security)
        scene.moe = await stack.enter_async_context(Coordinator(FileServers(folder / SERVERS), config))
        await stack.enter_async_context(scene.calling(scene.call()))
        await until(lambda: scene.value("sum(up)") == len(STARTED) + 1 and scene.calls > 20)
        # Before its first scrape it missed all servers.
        await until(lambda: not scene.firing(), 30, lambda: f"{scene.firing()} still fire")
        yield scene


def _configure(scene: Scene, coordinator: int) -> None:
    """The shipped rules, but looking at and waiting seconds where operators do minutes."""
    for file in RULES:
        text = re.sub(r"\[\d+[mh]\]", "[20s]", file.read_text().replace("[1m]", "[8s]"))
        text = text.replace("for: 30s", "for: 2s").replace("vector(256)", f"vector({ROUTED})")
        (scene.folder / file.name).write_text(re.sub(r"for: \d+[mh]", "for: 4s", text))
    servers = [scene.local(f"{node}:9464") for node in STARTED]
    # As servers.yml has them, and expected.yml expects.
    jobs = {
        "expertd": {"targets": servers, "labels": {"fleet": "compose"}},
        "llm": {"targets": [f"127.0.0.1:{coordinator}"]},
    }
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [file.name for file in RULES],
        "scrape_configs": [{"job_name": job, "static_configs": [targets]} for job, targets in jobs.items()],
    }
    (scene.folder / "prometheus.yml").write_text(yaml.safe_dump(config))


@contextlib.asynccontextmanager
async def _watching(prometheus: str, scene: Scene) -> AsyncIterator[None]:
    address = scene.local("prometheus:9090")
    # By default Debian's keeps its data in /var, for all that ever ran.
    options = ("--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}")
    with (scene.folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(prometheus, *options, cwd=scene.folder, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        await process.wait()
