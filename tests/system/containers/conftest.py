"""The images, in a Docker engine of the tests' own."""

import os
from collections.abc import Iterator

import pytest

from tests.system.containers.docker_engine import Engine, NoEngine
from tests.system.containers.images import build_images


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A running engine with the images expertd:cpu, expertd-client:cpu and compose.yaml's monitors."""
    if not (os.environ.get("CI") or os.environ.get("EXPERTD_IMAGE_TEST")):
        pytest.skip("builds and starts images, for minutes; 'make image-test' does, and CI")
    try:
        engine = build_images()
        with engine.alone(), engine.running(bridged=True):
            yield engine
    except NoEngine as reason:
        pytest.skip(str(reason))
