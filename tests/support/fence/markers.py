"""Why a test is skipped, and that in CI nothing but the machine's GPU decides it."""

import os
from pathlib import Path
from typing import TypeVar

import pytest
import torch

NEEDS_GPU = "needs an NVIDIA GPU of compute capability 9.0 or newer (Hopper), for FP8"
NEEDS_NONE = "is about machines without a GPU"
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

gpu_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason=NEEDS_GPU
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason=NEEDS_NONE)


def fence_stands() -> bool:
    """Whether this is CI on a machine where `.ci/run` installs what the tests need: as root on Debian."""
    return os.environ.get("CI") == "true" and os.geteuid() == 0 and Path("/etc/debian_version").exists()


def fenced(report: Report) -> Report:
    """`report`, failed where it would let a test go unnoticed in CI."""
    if fence_stands() and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if reason.removeprefix("Skipped: ") not in (NEEDS_GPU, NEEDS_NONE):
            report.outcome, report.longrepr = "failed", f"{reason}\nIn CI only what needs a GPU may be skipped."
    return report
