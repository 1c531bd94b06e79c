"""The kernels of a caller's GPU run on the CPU here, against real servers."""

import tests.support.kernels.interpreted  # noqa: F401
