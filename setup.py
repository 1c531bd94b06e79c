"""The extension module of native/, and the commit in the version; all else is in pyproject.toml."""

import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile
from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "native"))

from building import extension
from origin import BuildModules

# All files at once would be one core's work for minutes.
ParallelCompile().install()
setup(ext_modules=[extension()], cmdclass={"build_py": BuildModules})
