"""Why a test is skipped, in terms of hardware."""

import pytest
import torch

gpu_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs an NVIDIA GPU of compute capability 9.0 or newer (Hopper), for FP8",
)
