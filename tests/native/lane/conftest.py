"""The lane's two ends as a Python module."""

from types import ModuleType

import pytest

from tests.native.lane.programs import extension


@pytest.fixture(scope="session")
def native() -> ModuleType:
    return extension()
