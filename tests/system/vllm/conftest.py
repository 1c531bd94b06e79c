"""vLLM beside expertd's servers; it takes minutes, so it is for CI and `make vllm-test`."""

import os
from pathlib import Path

import pytest

from tests.system.vllm.environment import interpreter
from tests.system.vllm.models import FAMILIES, write_model


@pytest.fixture(scope="session")
def python() -> Path:
    """The Python that has vLLM."""
    if not (os.environ.get("CI") or os.environ.get("EXPERTD_VLLM_TEST")):
        pytest.skip("installs vLLM and starts it several times, for minutes; 'make vllm-test' does, and CI")
    return interpreter()


@pytest.fixture(scope="session")
def models(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family."""
    folder = tmp_path_factory.mktemp("models")
    return {family: write_model(folder, family) for family in FAMILIES}
