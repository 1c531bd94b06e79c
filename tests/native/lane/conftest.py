"""The lane's two ends as a Python module."""

import importlib.util
from types import ModuleType

import pytest

from tests.native.lane.programs import extension


@pytest.fixture(scope="session")
def native() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lane_testing", extension())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
