"""Programs that tests run but do not need: a skip says where to get them."""

import shutil

import pytest


def find_program(*names: str, package: str) -> str:
    """The first of `names` that is installed, or a skip that names the Debian package."""
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    pytest.skip(f"{names[0]} is not installed (Debian: apt-get install {package})")
