"""The kernels of a caller's GPU run on the CPU here, by Triton's interpreter, against real servers."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' module is imported
