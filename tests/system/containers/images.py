"""The images that the tests of this folder run, built for real.

    python -m tests.system.containers.images

builds them ahead of the tests, which wait for it and find everything done: in CI it goes on beside what comes first.
"""

import shutil

import yaml

from expertd.kernels.weights.files import cache_folder
from expertd.version import RELEASE
from tests.system.containers.docker_engine import ROOT, Engine, check_programs

BASE = "expertd-test-python"
REVISION = "0123456789abcdef0123456789abcdef01234567"
VERSION = f"{RELEASE}+g{REVISION[:12]}"
CREATED = "2026-01-02T03:04:05Z"
STAND_IN = """
FROM {base}
COPY monitor /usr/local/bin/monitor
COPY busybox /usr/local/bin/wget
COPY share /usr/share/prometheus
RUN install -d -o nobody -g nogroup /{name}
USER nobody
ENTRYPOINT ["monitor"]
"""
"""Debian's Prometheus and Alertmanager under the names of the images in compose.yaml, which only a registry has."""


def arguments() -> list[str]:
    """Of a build of expertd for CPUs."""
    told = {"BASE_IMAGE": BASE, "REQUIREMENTS": "demo", "VERSION": VERSION, "REVISION": REVISION, "CREATED": CREATED}
    return [word for name, value in told.items() for word in ("--build-arg", f"{name}={value}")]


def build_images() -> Engine:
    """An engine, not running, with the images expertd:cpu, expertd-client:cpu and compose.yaml's monitors.

    Raises `NoEngine`. What is built already takes seconds.
    """
    check_programs()
    engine = Engine(cache_folder() / "image-test")
    with engine.alone(), engine.running(bridged=False):
        engine.base_image(BASE)
        for tag, target in (("expertd:cpu", "server"), ("expertd-client:cpu", "client")):
            engine.build(ROOT, tag, "--target", target, *arguments())
        _build_monitors(engine)
        engine.docker("image", "prune", "--force")
    return engine


def _build_monitors(engine: Engine) -> None:
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    for name, program in (("prometheus", "prometheus"), ("alertmanager", "prometheus-alertmanager")):
        context = engine.root / name
        context.mkdir(exist_ok=True)
        (context / "Dockerfile").write_text(STAND_IN.format(base=BASE, name=name))
        shutil.copy(f"/usr/bin/{program}", context / "monitor")
        shutil.copy("/usr/bin/busybox", context / "busybox")
        shutil.copytree("/usr/share/prometheus", context / "share", dirs_exist_ok=True)
        engine.build(context, services[name]["image"])


if __name__ == "__main__":
    build_images()
