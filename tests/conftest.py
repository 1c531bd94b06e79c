"""Checkpoints that many tests read, and the fence around what may be skipped."""

import faulthandler
import gc
import os
import sys
from collections.abc import Generator
from pathlib import Path

# Some tests fork; expertd says the same.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Before expertd, which would silence it: servers in this process are to speak as they do in their own.
import grpc  # noqa: F401
import pytest
import torch

from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.proto.base.garbage import spared_imports
from tests.support.families import CONFIGS, SMALL, FamilyFolders, write_family
from tests.support.fence.markers import fence_stands, fenced
from tests.support.fence.wrong import EXIT_CODE, FOUND

# Threads that wait for each other by spinning take the processor from the servers under test.
torch.set_num_threads(1)
CRASH = os.open(path, os.O_WRONLY | os.O_CREAT) if (path := os.environ.get("EXPERTD_CRASH_FILE")) else None
"""Where the running test, and the threads of a crash, are written for `.ci/run` to show."""


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """After pytest's own, which writes to a terminal that shows no more than a crash's last lines."""
    if CRASH is not None:
        faulthandler.enable(CRASH)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Generator[None, object, object]:
    """Full collections, which take half a second, do not go through what is collected: servers here would be late."""
    gc.collect()
    with spared_imports():
        return (yield)


def pytest_runtest_logstart(nodeid: str) -> None:
    if CRASH is not None:
        os.ftruncate(CRASH, 0)
        os.lseek(CRASH, 0, os.SEEK_SET)
        os.write(CRASH, f"{nodeid}\n".encode())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return fenced((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return fenced((yield))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Failures are read at once: a long run that is cut off has no summary."""
    if report.failed and fence_stands():
        print(f"\n{report.nodeid} failed in its {report.when}:\n{report.longreprtext}", file=sys.__stderr__, flush=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """The Makefile tries once more what failed beside other tests, but not this."""
    if FOUND:
        session.exitstatus = EXIT_CODE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for what in FOUND:
        terminalreporter.line(f"wrong result: {what}")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 experts, top 4 of 2 of 4 groups, H 256, I 128, MoE layers 1 and 2, FP8."""
    return write_demo_checkpoint(tmp_path_factory.mktemp("models"), SMALL)


@pytest.fixture(scope="session", params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyFolders:
    """A small model of each family beside DeepSeek-V3: 16 experts, H 256, I 128."""
    return write_family(tmp_path_factory.mktemp("family"), request.param)
