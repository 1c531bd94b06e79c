"""Rules and dashboards against a real Prometheus and Alertmanager that watch real servers."""

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from expertd._native import Histogram
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.telemetry.metrics import CoordinatorMetrics
from expertd.client.tools.cluster import LocalCluster, even_shards
from expertd.client.transport.security import ClientSecurity
from expertd.server.hardware.gpu_health import GpuHealth
from expertd.server.hardware.xid import FATAL
from expertd.server.scheduling import gpu_watch
from expertd.server.scheduling.gpu_watch import GpuWatch
from expertd.server.telemetry.metrics import TOKEN_BUCKETS, Metrics, buckets
from tests.support.certificates import Authority
from tests.support.native.stand_in_nvml import UUID, StandInNvml
from tests.support.process import free_port
from tests.support.programs import find_program

DEPLOY = Path(__file__).parents[3] / "deploy"
RULES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
OPTIONS = ["--backend", "torch", "--threads", "1", "--per-expert-metrics", "--admin-listen", "127.0.0.1:0"]
ALONE = {"cluster.listen-address": ""}
WAIT_SECONDS = 300


def test_rules_give_what_their_tests_say_and_none_is_without_a_test_or_use() -> None:
    promtool = find_program("promtool", package="prometheus")
    tests = sorted((DEPLOY / "prometheus" / "tests").glob("*.yml"))
    for command, files in (("check", RULES), ("test", tests)):
        done = subprocess.run([promtool, command, "rules", *files], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    rules = [rule for group in _rules() for rule in group["rules"]]
    fired: set[str] = set()
    ended: set[str] = set()
    for test in (test for file in tests for test in yaml.safe_load(file.read_text())["tests"]):
        begun: set[str] = set()
        for case in sorted(test.get("alert_rule_test", ()), key=lambda case: _seconds(case["eval_time"])):
            if case["exp_alerts"]:
                begun.add(case["alertname"])
            elif case["alertname"] in begun:
                ended.add(case["alertname"])
        fired |= begun
    assert fired == ended == {rule["alert"] for rule in rules if "alert" in rule}
    recorded = {rule["record"] for rule in rules if "record" in rule}
    texts = "".join(re.sub("record: .*", "", file.read_text()) for file in (*DASHBOARDS, *RULES))
    assert {name for name in recorded if name not in texts} == set()


def test_every_alert_links_to_what_there_is_to_do_about_it() -> None:
    document = (DEPLOY.parent / "docs" / "operations.md").read_text()
    sections = {heading.lower() for heading in re.findall(r"^### (Expertd\w+)$", document, re.MULTILINE)}
    alerts = [rule for group in _rules() for rule in group["rules"] if "alert" in rule]
    links = {alert["alert"]: alert["annotations"]["runbook_url"] for alert in alerts}
    assert links == {name: f"docs/operations.md#{name.lower()}" for name in links}
    assert sections == {name.lower() for name in links}


def test_the_alert_of_xid_errors_knows_the_fatal_ones() -> None:
    (expression,) = [
        rule["expr"] for group in _rules() for rule in group["rules"] if rule.get("alert") == "ExpertdGpuXid"
    ]
    assert re.findall(r"\d+", expression.partition('xid=~"')[2].partition('"')[0]) == [str(xid) for xid in FATAL]


def _seconds(time: str) -> int:
    """Of Prometheus' "2m30s"."""
    return sum(int(count) * {"h": 3600, "m": 60, "s": 1}[unit] for count, unit in re.findall(r"(\d+)([hms])", time))


async def test_every_panel_has_data_and_a_killed_server_raises_its_alert(small_model: Path, tmp_path: Path) -> None:
    prometheus = find_program("prometheus", package="prometheus")
    alertmanager = find_program("alertmanager", "prometheus-alertmanager", package="prometheus-alertmanager")
    async with contextlib.AsyncExitStack() as stack:
        authority = Authority(tmp_path)
        certificate, key = authority.issue("server")
        tls = ["--tls-cert", str(certificate), "--tls-key", str(key)]
        cluster = await stack.enter_async_context(LocalCluster(small_model, even_shards(16, 2), OPTIONS + tls))
        registry = CollectorRegistry()
        coordinator_target = stack.enter_context(_exported(registry))
        gpu_target = stack.enter_context(_exported(_gpu()))
        alerts, metrics = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        servers = [urllib.parse.urlsplit(server.metrics_url).netloc for server in cluster.servers]
        targets = {"expertd": [*servers, gpu_target], "llm": [coordinator_target]}
        _write_config(tmp_path, targets, alerts)
        for program, options in (
            (alertmanager, {"config.file": "alertmanager.yml", "web.listen-address": alerts} | ALONE),
            (prometheus, {"config.file": "prometheus.yml", "web.listen-address": metrics, "storage.tsdb.path": "data"}),
        ):
            command = [program, *(f"--{name}={value}" for name, value in options.items())]
            await stack.enter_async_context(_running(command, tmp_path))
        config = CoordinatorConfig(metrics=CoordinatorMetrics(registry), security=ClientSecurity(root_ca=authority.pem))
        moe = await stack.enter_async_context(Coordinator(cluster.addresses, config))
        load = asyncio.create_task(_load(moe))
        try:
            await _until_every_panel_has_data(metrics, _expressions(servers[0], gpu_target))
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
        cluster.servers[0].process.send_signal(signal.SIGKILL)
        await _until_firing(alerts, {"alertname": "ExpertdServerDown", "instance": servers[0], "severity": "critical"})
        await _until_firing(alerts, {"alertname": "ExpertdExpertsWithoutServer", "experts": "0-7", "layers": "1-2"})


def _rules() -> Iterator[dict[str, Any]]:
    for file in RULES:
        yield from yaml.safe_load(file.read_text())["groups"]


def _gpu() -> CollectorRegistry:
    """What a server on a GPU exports beside the rest; there is none here."""
    metrics = Metrics(CollectorRegistry())
    metrics.export(metrics.device_busy, metrics.device_memory)
    for kind, gigabytes in {"size": 80, "free": 8, "allocated": 60, "reserved": 70}.items():
        metrics.device_memory.labels(0, kind).set(gigabytes << 30)
    counted = Histogram(TOKEN_BUCKETS)
    counted.observe(64)
    metrics.batch_tokens.set_function(lambda: [((), buckets(TOKEN_BUCKETS, *counted.read()))])
    metrics.device_busy.set_function(lambda: [((0,), (0.5,))])
    health = GpuHealth.open(StandInNvml(), UUID)
    assert health is not None
    gpu_watch.export(metrics, {0: GpuWatch(0, health, metrics, lambda _: None)})
    return metrics.registry


@contextlib.contextmanager
def _exported(registry: CollectorRegistry) -> Iterator[str]:
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def _write_config(folder: Path, targets: dict[str, list[str]], alertmanager: str) -> None:
    """The shipped rules, but waiting seconds where operators wait minutes."""
    for file in RULES:
        (folder / file.name).write_text(re.sub(r"for: \w+", "for: 2s", file.read_text()))
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [file.name for file in RULES],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": addresses}]} for job, addresses in targets.items()
        ],
    }
    (folder / "alertmanager.yml").write_text(
        yaml.safe_dump({"route": {"receiver": "none"}, "receivers": [{"name": "none"}]})
    )
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))


@contextlib.asynccontextmanager
async def _running(command: list[str], folder: Path) -> AsyncIterator[None]:
    with (folder / "log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(*command, cwd=folder, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


async def _load(moe: Coordinator) -> None:
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = int(torch.randint(1, 40, (), generator=generator))
        ids = torch.rand(tokens, 16, generator=generator).argsort(dim=1)[:, :4]
        hidden = torch.randn(tokens, 256, generator=generator)
        await moe(1 + tokens % 2, hidden, topk_ids=ids, topk_weights=torch.rand(tokens, 4, generator=generator))
        await asyncio.sleep(0.02)


def _expressions(server: str, gpu: str) -> Iterator[tuple[str, str]]:
    """Panel and PromQL with Grafana's variables filled in; what only GPUs have is asked of the stand-in for one."""
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                expression = target["expr"].replace("$__rate_interval", "30s")
                instance = gpu if "_device_" in expression or "_gpu_" in expression else server
                yield f"{file.stem}: {panel['title']}", expression.replace("$instance", instance)


async def _until_every_panel_has_data(prometheus: str, expressions: Iterable[tuple[str, str]]) -> None:
    waiting = set(expressions)
    assert len(waiting) > 40
    deadline = asyncio.get_running_loop().time() + WAIT_SECONDS
    while waiting:
        assert asyncio.get_running_loop().time() < deadline, f"panels without data: {sorted(waiting)}"
        await asyncio.sleep(1)
        for panel, expression in tuple(waiting):
            answer = await _get(f"http://{prometheus}/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
            values = [sample["value"][1] for sample in (answer or {"data": {"result": []}})["data"]["result"]]
            if set(values) - {"NaN"}:
                waiting.discard((panel, expression))


async def _until_firing(alertmanager: str, labels: dict[str, str]) -> None:
    """Return once an alert with `labels`, and perhaps others, fires."""
    deadline = asyncio.get_running_loop().time() + WAIT_SECONDS
    firing: list[dict[str, str]] = []
    while not any(labels.items() <= alert.items() for alert in firing):
        assert asyncio.get_running_loop().time() < deadline, f"{labels} does not fire, but {firing}"
        await asyncio.sleep(0.5)
        answer = await _get(f"http://{alertmanager}/api/v2/alerts?active=true")
        firing = [alert["labels"] for alert in answer or ()]


async def _get(url: str) -> Any:  # noqa: ANN401
    """The JSON at `url`; None while nobody answers there."""

    def read() -> Any:  # noqa: ANN401
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)

    try:
        return await asyncio.to_thread(read)
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return None
        pytest.fail(f"{url}: {error.read().decode()}")
    except OSError:
        return None
