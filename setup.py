"""The extension module of native/; all else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "native"))

from building import extension

setup(ext_modules=[extension()])
