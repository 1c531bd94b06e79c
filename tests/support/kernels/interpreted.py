"""Importing this has Triton interpret the kernels of stream-ordered calls on the CPU, where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, and now and then later
    from expertd.client.stream import kernels

    assert type(kernels.combine).__name__ == "InterpretedFunction", "the kernels were imported before"
