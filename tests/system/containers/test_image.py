"""The images as an operator finds them: small, without root, quick to stop, able to compile kernels."""

import json
import time
from typing import Any

import pytest

from expertd.version import RELEASE
from tests.system.containers.docker_engine import DOCKER, Engine
from tests.system.containers.images import CREATED, REVISION, VERSION

CONFINED = (
    "--rm",
    "--network=none",
    "--read-only",
    "--tmpfs=/tmp",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
)
COMPILE = """
from expertd.kernels.cutile.tools.inspect import compile_kernel
from expertd.kernels.cutile.tools.registry import shipped_launches
from expertd.kernels.cutile.pipeline.table import Table
launch = next(shipped_launches("sm_90", Table()))
print(len(compile_kernel(launch.kernel, launch.args, "sm_90")))
"""
INSTALLED = """
import importlib.metadata, json, re
found = {re.sub("[-_.]+", "-", one.name).lower(): one.version for one in importlib.metadata.distributions()}
print(json.dumps([found, json.load(open("/opt/expertd/sbom.cdx.json"))]))
"""
TIMED = """
import pathlib
# PEP 552: 0 stands for modules that are compared with the time of their source.
print(sum(one.read_bytes()[4:8] == bytes(4) for one in pathlib.Path("/opt/expertd").rglob("*.pyc")))
"""
PLACES = ("/opt", "/home", "/models", "/run/expertd", "/etc/passwd", "/etc/group", "/etc/shadow")


def inspect(engine: Engine, image: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(engine.docker("image", "inspect", image))[0]
    return found


@pytest.mark.parametrize("image", ["expertd:cpu", "expertd-client:cpu"])
def test_an_image_is_labelled_and_runs_without_root(engine: Engine, image: str) -> None:
    config = inspect(engine, image)["Config"]
    assert config["User"] == "10001:10001"
    told = {"version": VERSION, "revision": REVISION, "created": CREATED, "licenses": "Apache-2.0"}
    assert {f"org.opencontainers.image.{name}": value for name, value in told.items()}.items() <= config[
        "Labels"
    ].items()
    version = engine.docker("run", *CONFINED, "--entrypoint=expertd", image, "--version")
    assert version.strip() == f"expertd {VERSION}"
    shown = engine.docker("run", *CONFINED, "--entrypoint=id", image)
    assert shown.startswith("uid=10001(expertd) gid=10001(expertd)")


@pytest.mark.parametrize("image", ["expertd:cpu", "expertd-client:cpu"])
def test_the_bill_of_materials_is_what_is_installed(engine: Engine, image: str) -> None:
    installed, bill = json.loads(engine.docker("run", *CONFINED, "--entrypoint=python3", image, "-c", INSTALLED))
    told = {one["name"]: one["version"] for one in bill["components"]}
    assert told | {"expertd": RELEASE} == installed
    assert bill["metadata"]["component"]["version"] == VERSION


@pytest.mark.parametrize("image", ["expertd:cpu", "expertd-client:cpu"])
def test_nothing_in_an_image_has_the_time_of_its_build(engine: Engine, image: str) -> None:
    """Two builds then have the same layers, as `make images-twice` shows."""
    newer = engine.docker("run", *CONFINED, "--entrypoint=find", image, *PLACES, "-newermt", "1980-01-02")
    assert newer == ""
    assert engine.docker("run", *CONFINED, "--entrypoint=python3", image, "-c", TIMED).strip() == "0"


def test_the_server_image_declares_its_volumes_ports_and_health_check(engine: Engine) -> None:
    config = inspect(engine, "expertd:cpu")["Config"]
    assert set(config["Volumes"]) == {"/models", "/home/expertd/.cache"}
    assert set(config["ExposedPorts"]) == {"50051/tcp", "9464/tcp"}
    assert config["Healthcheck"]["Test"] == ["CMD", "expertd", "health", "http://127.0.0.1:9464/readyz"]


def test_an_option_that_cannot_work_ends_with_its_exit_code(engine: Engine) -> None:
    ended = engine.run(DOCKER, "run", *CONFINED, "expertd:cpu", "serve", "--model=/models", "--experts=0-31")
    assert ended.returncode == 2
    assert "/models/config.json does not exist" in ended.stdout


def test_kernels_compile_in_the_image(engine: Engine) -> None:
    shown = engine.docker("run", *CONFINED, "--entrypoint=python3", "expertd:cpu", "-c", COMPILE)
    assert int(shown) > 1000, "bytes of a cubin"


def test_the_client_image_has_no_cuda_and_serves_nothing(engine: Engine) -> None:
    shown = engine.docker(
        "run", *CONFINED, "expertd-client:cpu", "python3", "-c", "import torch; print(torch.version.cuda)"
    )
    assert shown.strip() == "None"
    packages = engine.docker(
        "run", *CONFINED, "expertd-client:cpu", "sh", "-c", "ls /opt/expertd/lib/python3*/site-packages"
    )
    assert not {"nvidia", "cuda", "transformers"} & set(packages.split())
    assert inspect(engine, "expertd-client:cpu")["Size"] < inspect(engine, "expertd:cpu")["Size"]


def test_a_program_without_signal_handlers_stops_at_once(engine: Engine) -> None:
    """As Python does before it listens; as PID 1 it would ignore the signal and be killed after the stop's grace."""
    name = "expertd-test-signal"
    engine.docker("run", "--detach", "--name", name, *CONFINED[1:], "expertd-client:cpu", "sleep", "600")
    started = time.monotonic()
    engine.docker("stop", "--time=60", name)
    assert time.monotonic() - started < 30
    assert engine.docker("inspect", "--format={{.State.ExitCode}}", name).strip() == "143"
    engine.docker("rm", name)
