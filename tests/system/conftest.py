"""The images, built for real, in a Docker engine of the tests' own."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from expertd import __version__
from expertd.kernels.weights.files import cache_folder
from tests.system.docker_engine import Engine, NoEngine, check_programs

ROOT = Path(__file__).parents[2]
BASE = "expertd-test-base"
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


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A running engine with the images expertd:cpu, expertd-client:cpu and compose.yaml's monitors."""
    if not (os.environ.get("CI") or os.environ.get("EXPERTD_IMAGE_TEST")):
        pytest.skip("builds and starts images, for minutes; 'make image-test' does, and CI")
    engine = Engine(cache_folder() / "image-test")
    try:
        check_programs()
        with engine.running(bridged=False):
            engine.base_image(BASE)
            for tag, target in (("expertd:cpu", "server"), ("expertd-client:cpu", "client")):
                arguments = (f"BASE_IMAGE={BASE}", "REQUIREMENTS=demo", f"VERSION={__version__}", "REVISION=tested")
                options = [word for argument in arguments for word in ("--build-arg", argument)]
                engine.build(ROOT, tag, "--target", target, *options)
            _build_monitors(engine)
            engine.docker("image", "prune", "--force")
        with engine.running(bridged=True):
            yield engine
    except NoEngine as reason:
        pytest.skip(str(reason))


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
