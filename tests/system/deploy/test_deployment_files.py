"""Dockerfile, lock files and compose files: what can be checked of them without an engine."""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

from expertd.client.fleet.discovery import DnsServers, StaticServers
from expertd.client.integrations.vllm.settings import read
from expertd.kernels.model.ranges import parse_ranges
from expertd.server.options.config import ALL_DEVICES, ServerConfig

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
COMPOSE = ROOT / "deploy/compose.yaml"
LOCKS = {"server": "server", "client": "client", "demo": "demo"}
"""Lock file -> extra of pyproject.toml that it resolves."""


def pins(name: str) -> dict[str, str]:
    """Package -> version of a lock file; fails on a line that is neither a pin nor a hash."""
    text = (ROOT / f"requirements/{name}.lock").read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        pin = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})+)", line.strip())
        assert pin, f"{name}.lock: {line[:100]!r} is no pin with hashes"
        found[pin[1]] = pin[2]
    return found


def wanted(extra: str) -> list[Requirement]:
    """What pyproject.toml asks for, with the extras that an extra refers to."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = []
    for text in [*project["dependencies"], *project["optional-dependencies"][extra]]:
        requirement = Requirement(text)
        if requirement.name == "expertd":
            requirements += [own for inner in requirement.extras for own in wanted(inner)]
        else:
            requirements.append(requirement)
    return requirements


@pytest.mark.parametrize("name", LOCKS)
def test_lock_files_hold_what_the_project_asks_for(name: str) -> None:
    locked = pins(name)
    for requirement in wanted(LOCKS[name]):
        if requirement.marker is None or requirement.marker.evaluate():
            version = locked.get(requirement.name)
            assert version, f"{requirement.name} is missing from {name}.lock; run 'make lock'"
            assert requirement.specifier.contains(version.partition("+")[0]), (
                f"{requirement}: {version}; run 'make lock'"
            )
    assert "dumb-init" in locked


def test_only_the_server_image_has_cuda() -> None:
    assert pins("server")["torch"].count("+") == 0
    assert "nvidia-cuda-tileiras" in pins("server")
    assert pins("client")["torch"].endswith("+cpu")
    assert not [name for name in pins("client") if name.startswith(("nvidia", "cuda", "transformers"))]


def test_the_dockerfile_is_clean() -> None:
    done = subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def compose(*files: str) -> dict[str, Any]:
    """The services of merged compose files."""
    options = [word for file in files for word in ("--file", str(ROOT / "deploy" / file))]
    command = [str(BIN / "docker-compose"), *options, "config", "--format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.cpu.yaml")])
def test_compose_starts_every_expert_once_and_watches_it(files: tuple[str, ...]) -> None:
    services = compose(*files)
    servers = {name: service for name, service in services.items() if name.startswith("server-")}
    owned = [expert for service in servers.values() for expert in parse_ranges(service["command"][1])]
    assert sorted(owned) == list(range(256))
    assert all(service["read_only"] and service["cap_drop"] == ["ALL"] for service in services.values())
    for name, service in servers.items():
        # The bridge keeps callers in other containers from sharing memory; the volume is for that.
        assert service["command"][2:] == ["--unix-socket", f"/run/expertd/{name}.sock"]
        assert {"sockets": "/run/expertd"}.items() <= {
            volume["source"]: volume["target"] for volume in service["volumes"]
        }.items()
    ports = [port["published"] for service in services.values() for port in service.get("ports", ())]
    assert len(set(ports)) == len(ports) == 11
    assert all(port["host_ip"] == "127.0.0.1" for service in services.values() for port in service.get("ports", ()))
    assert watched(services) == [f"{name}:9464" for name in sorted(servers)]


def watched(services: dict[str, Any]) -> list[str]:
    """What Prometheus scrapes of expertd, all of whose experts it must find."""
    jobs = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    (expertd,) = (job for job in jobs if job["job_name"] == "expertd")
    (found,) = expertd["file_sd_configs"]
    mounted = {volume["target"]: Path(volume["source"]) for volume in services["prometheus"]["volumes"]}
    (name,) = found["files"]
    file = mounted.get(f"/etc/prometheus/{name}", mounted["/etc/prometheus"] / name)
    (servers,) = yaml.safe_load(file.read_text())
    (expected,) = yaml.safe_load((ROOT / "deploy/prometheus/rules/expected.yml").read_text())["groups"][0]["rules"]
    assert expected["expr"] == "vector(256)"
    assert expected["labels"] == {"job": "expertd"} | servers["labels"]
    targets: list[str] = servers["targets"]
    return targets


def test_one_server_has_all_gpus_of_the_machine() -> None:
    services = compose("compose.yaml", "compose.node.yaml")
    (name,) = (name for name in services if name.startswith("server-"))
    assert watched(services) == [f"{name}:9464"]
    parser = argparse.ArgumentParser()
    ServerConfig.add_arguments(parser)
    config = ServerConfig.from_arguments(
        parser.parse_args([*services[name]["entrypoint"][5:], *services[name]["command"]])
    )
    assert config.experts == tuple(range(256))
    assert config.devices == ALL_DEVICES
    (gpus,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
    assert gpus["device_ids"] == [str(gpu) for gpu in range(8)]


def test_each_server_has_a_gpu_of_its_own_unless_there_are_none() -> None:
    services = compose("compose.yaml")
    devices = [
        services[f"server-{index}"]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for index in range(8)
    ]
    assert devices == [[str(index)] for index in range(8)]
    on_cpus = compose("compose.yaml", "compose.cpu.yaml")
    assert not any("deploy" in on_cpus[f"server-{index}"] for index in range(8))
    assert all("--backend=torch" in on_cpus[f"server-{index}"]["entrypoint"] for index in range(8))


def test_mps_is_there_before_the_servers_that_share_its_memory_and_its_pipe() -> None:
    services = compose("compose.yaml", "compose.mps.yaml")
    mps = services["mps"]
    pipe = mps["environment"]["CUDA_MPS_PIPE_DIRECTORY"]
    assert mps["ipc"] == "shareable"
    assert mps["command"][-1].endswith("exec nvidia-cuda-mps-control -f")
    assert (mps["read_only"], mps["cap_drop"]) == (True, ["ALL"])
    assert mps["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == [str(gpu) for gpu in range(8)]
    for index in range(8):
        server = services[f"server-{index}"]
        assert server["ipc"] == "service:mps"
        assert server["environment"]["CUDA_MPS_PIPE_DIRECTORY"] == pipe
        assert server["depends_on"]["mps"]["condition"] == "service_healthy"
        for service in (server, mps):
            folder = {one["source"]: one["target"] for one in service["volumes"]}["sockets"]
            assert pipe.startswith(f"{folder}/")
    assert "mps" not in str(compose("compose.yaml"))


def test_vllm_beside_the_servers_calls_all_of_them_and_has_a_gpu_of_its_own() -> None:
    services = compose("compose.yaml", "compose.vllm.yaml")
    vllm = services.pop("vllm")
    told = read(None, vllm["environment"])
    assert told is not None
    assert told.servers == StaticServers(tuple(f"{name}:50051" for name in services if name.startswith("server-")))
    gpus = [
        gpu
        for service in (vllm, *services.values())
        for device in service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", ())
        for gpu in device["device_ids"]
    ]
    assert len(set(gpus)) == len(gpus) == 9


def test_vllm_in_kubernetes_finds_the_charts_servers() -> None:
    objects = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/vllm.yaml").read_text()))
    for each in objects:
        kubernetes_validate.validate(each, "1.35.0", strict=True)
    (container,) = objects[0]["spec"]["template"]["spec"]["containers"]
    told = read(None, {variable["name"]: variable["value"] for variable in container["env"]})
    assert told is not None
    assert told.servers == DnsServers("moe", 50051)
